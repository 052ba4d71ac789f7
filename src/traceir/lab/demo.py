"""The demonstration: a small mixed gallery of pictures, texts and pairs, searched in every way there is, judged by labels.

Which queries are asked is fixed by a rule (`WISHES`: the first of a row with so many steps, in file order), never by outcome.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from traceir.data import mbeir
from traceir.errors import DataError
from traceir.index import SqliteIndex, open_index
from traceir.ingest import AddReport, add
from traceir.items import Query
from traceir.lab.fixture import unpack
from traceir.lab.gallery import Entry, cost, first_right, reasoning_steps, verdict, write_gallery
from traceir.search import EncoderLike, Searcher, SearchResult

PER_ROW: Final = 60
"""Candidates that each row lends to the gallery: what its chosen queries are judged with, then others of its pool."""
DEPTH: Final = 10
"""How far down the list a right hit counts as found."""


@dataclass(frozen=True, slots=True)
class Wish:
    """Ask the first `count` queries of a row that need so many steps."""

    title: str
    row: str
    steps: int
    count: int = 1


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


@dataclass(frozen=True, slots=True)
class Answer:
    """A question with what the search made of it."""

    question: Question
    result: SearchResult

    @property
    def is_right(self) -> bool:
        """Whether the first hit is a right one."""
        return first_right(self.result.hits, self.question.right) == 1


def prepare(out: Path) -> tuple[Path, list[Question]]:
    """The gallery as a pool file, and the questions; unpacks the small frozen MiniBEIR first where it is missing."""
    data = unpack(out / "minibeir")
    tasks = {task.name: task for task in mbeir.find_tasks(data, "test")}
    instructions = mbeir.read_instructions(data)
    questions: list[Question] = []
    lines: dict[str, str] = {}
    for row in dict.fromkeys(wish.row for wish in WISHES):
        asked = list(_choose(tasks[row], [wish for wish in WISHES if wish.row == row]))
        prompts = instructions.prompts(tasks[row].dataset_id, tasks[row].query_modality, tasks[row].cand_modality)
        for wish, record in asked:
            query = mbeir.to_query(record, prompts[0], data)
            questions.append(Question(wish.title, row, wish.steps, query, frozenset(record.positives)))
        lines |= _lend(tasks[row], [record for _, record in asked])
    pool = data / "cand_pool" / "demo" / "mbeir_demo_cand_pool.jsonl"
    _write_text(pool, "".join(f"{line}\n" for line in lines.values()))
    order = {(wish.row, wish.steps): place for place, wish in enumerate(WISHES)}
    return pool, sorted(questions, key=lambda one: order[one.row, one.steps])


def fill(pool: Path, out: Path, encoder: EncoderLike, *, progress: bool = True) -> tuple[SqliteIndex, AddReport]:
    """The index of the gallery, one a model, filled by the same road as `traceir index add`; close it after use."""
    index = open_index(
        out / f"index-{encoder.fingerprint.replace('/', '-').replace(':', '-')}",
        fingerprint=encoder.fingerprint,
        prompt_version=encoder.prompt_version,
        dim=encoder.width,
        create=True,
    )
    try:
        report = add([pool], index, encoder, progress=progress)
    except BaseException:
        index.close()
        raise
    if report.failed:
        index.close()
        raise DataError(f"{report.failed[0].place}: {report.failed[0].reason}; remove {out} and run the demo again")
    return index, report


def ask(questions: Sequence[Question], encoder: EncoderLike, index: SqliteIndex) -> list[Answer]:
    """Every question by the `auto` route, one call each, as a user's would be."""
    searcher = Searcher(encoder, index)
    return [Answer(question, searcher.search(question.query, k=DEPTH)) for question in questions]


def write_page(answers: Sequence[Answer], out: Path) -> Path:
    """The contact sheet; returns the path of its page."""
    entries = [
        Entry(one.question.title, one.question.query, one.result.encoding, one.result.hits, one.question.right,
              f"{one.question.row}, {_steps(one.question.steps)}")
        for one in answers
    ]  # fmt: skip
    intro = (
        "A small mixed gallery searched by words, by a picture, and by a picture with words. The queries were chosen by a fixed "
        "rule, not by success; hits are judged by the benchmark's labels."
    )
    return write_gallery(entries, out / "page", title="TraceIR: reason, then retrieve", intro=intro)


def describe(number: int, answer: Answer, *, top: int = 3) -> str:
    """One answer for people: query, route, reasoning, the first hits, and whether the right one was first."""
    question, encoding = answer.question, answer.result.encoding
    image = ", ".join(image.name for image in question.query.images)
    asked = " + ".join(part for part in (f"[{image}]" if image else "", question.query.text) if part)
    lines = [
        f"{number}. {question.title} ({question.row}, {_steps(question.steps)})",
        f"   query      {asked}",
        f"   route      {encoding.route} ({cost(encoding)})",
    ]
    for place, step in enumerate(reasoning_steps(encoding.reasoning)):
        lines.append(f"   {'reasoning' if place == 0 else '':9}  {step}")
    for hit in answer.result.hits[:top]:
        shown = " | ".join(part for part in (Path(hit.image).name if hit.image else "", hit.text or "") if part)
        lines.append(f"   {'*' if hit.id in question.right else ' '} {hit.rank}  {hit.score:.3f}  {shown}  ({hit.id})")
    lines.append(f"   {verdict(answer.result.hits, question.right)}")
    return "\n".join(lines)


def _choose(task: mbeir.Task, wishes: Sequence[Wish]) -> Iterator[tuple[Wish, mbeir.Record]]:
    """The first records, in file order, that the wishes ask for; DataError where there are too few."""
    labels = mbeir.read_labels(task.labels_path)
    records = list(mbeir.read_queries(task.query_path))
    for wish in wishes:
        fitting = [record for record in records if record.qid in labels and labels[record.qid].steps == wish.steps]
        if len(fitting) < wish.count:
            raise DataError(f"{task.query_path} has {len(fitting)} queries of {_steps(wish.steps)}; build the folder again")
        yield from ((wish, record) for record in fitting[: wish.count])


def _lend(task: mbeir.Task, records: Sequence[mbeir.Record]) -> Mapping[str, str]:
    """did -> pool line: all positives and distractors of the records, then others in the pool's order up to PER_ROW."""
    pool = {candidate.did: candidate for candidate in mbeir.read_pool(task.pool_path)}
    needed = {did for record in records for did in (*record.positives, *record.negatives) if did in pool}
    others = [did for did in pool if did not in needed]
    chosen = {*needed, *others[: max(0, PER_ROW - len(needed))]}
    # In the pool's order, which is scattered, so that equal scores favour nobody.
    return {did: _line(pool[did]) for did in pool if did in chosen}


def _line(candidate: mbeir.Candidate) -> str:
    """The candidate with its text in the form the models are trained on."""
    record = {
        "did": candidate.did,
        "txt": mbeir.candidate_text(candidate) or None,
        "img_path": candidate.image_path,
        "modality": candidate.modality,
    }
    return json.dumps(record, ensure_ascii=False)


def _steps(count: int) -> str:
    return "1 step" if count == 1 else f"{count} steps"


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
