"""The demonstration and its contact sheet: a fixed choice of queries, an honest verdict, a page that needs nothing else."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path

import numpy as np
import pytest
from conftest import both_routes, image_of, make_queries, random_model

from traceir.cli import main as cli
from traceir.data import mbeir
from traceir.errors import InputError
from traceir.items import Encoding, Hit, Query
from traceir.lab import demo
from traceir.lab.fixture import unpack
from traceir.lab.gallery import Entry, cost, reasoning_steps, verdict, write_gallery
from traceir.model import save


def encoding(reasoning: str = "") -> Encoding:
    route = "reason" if reasoning else "direct"
    return Encoding(np.ones(1, dtype=np.float32), route, reasoning, len(reasoning.split()), 0.25, False)


def hit(rank: int, id: str, text: str | None = "a text", image: str | None = None) -> Hit:
    return Hit(id, 1.0 - rank / 10, rank, "text", text, image, {})


def test_the_command_answers_all_questions_and_says_where_it_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, questions = demo.prepare(tmp_path)
    candidates = {candidate.did: candidate for candidate in mbeir.read_pool(pool)}
    assert 250 <= len(candidates) <= 900
    assert {candidate.modality for candidate in candidates.values()} == {"image", "text", "image,text"}
    assert [(question.row, question.steps) for question in questions] == [(wish.row, wish.steps) for wish in demo.WISHES]
    for question in questions:
        task = next(task for task in mbeir.find_tasks(tmp_path / "minibeir", "test") if task.name == question.row)
        labels = mbeir.read_labels(task.labels_path)
        first = next(record for record in mbeir.read_queries(task.query_path) if labels[record.qid].steps == question.steps)
        assert question.query.id == first.qid and question.right == set(first.positives) and question.query.instruction
        assert {*first.positives, *first.negatives} <= candidates.keys(), "every answer and its twins"
    checkpoint = save(both_routes(random_model(), make_queries()), tmp_path / "model")
    assert cli.main(["demo", "--out", str(tmp_path), "--model", str(checkpoint)]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    right, wrong = lines.count("   right one first"), sum(line.startswith("   wrong: ") for line in lines)
    assert right + wrong == len(questions) == sum(line.startswith("   query ") for line in lines)
    assert f"{right} of {len(questions)} queries have the right one first" in printed
    page = Path(lines[-2].removeprefix("contact sheet: ")).read_text()
    assert page.count('class="badge') == len(questions) and page.count("verdict good") == right
    addresses = re.findall(r'(?:src|href|action)="([^"]*)"', page)
    assert addresses and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    assert "http" not in page.replace("http-equiv", "") and "traceir serve --index" in lines[-1]
    assert cli.main(["demo", "--out", str(tmp_path), "--model", str(checkpoint)]) == 0
    again = capsys.readouterr().out
    assert again.splitlines()[1:] == lines[1:], "the same answers from the index that is there"
    assert f"{len(candidates)} of them indexed before" in again


def test_a_verdict_never_flatters() -> None:
    hits = [hit(1, "a"), hit(2, "b"), hit(3, "c")]
    assert verdict(hits, frozenset({"a", "c"})) == "right one first"
    assert verdict(hits, frozenset({"c"})) == "wrong: the right one came at rank 3"
    assert verdict(hits, frozenset({"z"})) == "wrong: no right one among the first 3"
    assert cost(encoding("one")) == "P(<|emb|>) 0.250, 1 token" and reasoning_steps("  ") == []
    steps = reasoning_steps("see red cube , blue ball ; swap left right;blue ; ")
    assert steps == ["see red cube, blue ball", "swap left right;blue"]


def test_the_page_escapes_everything_and_marks_the_right_hit(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script> & \x1b'
    query = Query.of(text=evil, image=image_of(1), instruction=evil, target="text")
    hits = [hit(1, evil, evil), hit(2, "good", "fine"), hit(3, "gone", None, str(tmp_path / 'no"<b>.png'))]
    entry = Entry(evil, query, encoding(f"{evil}; second"), hits, frozenset({"good"}), evil)
    page = write_gallery([entry], tmp_path / "page", title=evil, intro=evil).read_text()
    assert "<script" not in page and "<b>.png" not in page and "\x1b" not in page
    assert unescape(page).count('<script>alert("1")</script>') == 10
    assert page.count('class="card right"') == 1 and "the right one came at rank 2" in page
    assert 'class="lost"' in page and page.count("<img ") == 1 and page.count("<li>") == 2
    assert "prefers-color-scheme: dark" in page and "Content-Security-Policy" in page
    page = write_gallery([Entry("t", Query.of(text="a"), encoding(), [hit(1, "a")])], tmp_path / "unjudged").read_text()
    assert 'class="verdict' not in page and "right one first" not in page and 'class="badge direct"' in page


def test_the_frozen_data_is_whole_or_not_there(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(unpack, [tmp_path / "data"] * 4)) == {tmp_path / "data"}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    for split in ("test", "train"):
        queries = [record for path in (tmp_path / "data/query" / split).iterdir() for record in mbeir.read_queries(path)]
        path = tmp_path / f"data/cand_pool/global/mbeir_union_{split}_cand_pool.jsonl"
        images = {candidate.did: candidate.image_path for candidate in mbeir.read_pool(path)}
        assert all({*record.positives, *record.negatives} <= images.keys() and record.negatives for record in queries)
        named = {*images.values(), *(record.image_path for record in queries)} - {None}
        assert named and all((tmp_path / "data" / str(name)).is_file() for name in named)
    with pytest.raises(InputError, match="is not empty"):
        unpack(tmp_path)
