"""Long texts as passages: nothing is left out, borders are those of sentences and paragraphs, ids lead back to the file."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest

from traceir.collection.passages import WORDS, passages
from traceir.collection.sources import FILE_FIELD, STAT_FIELD, Failure, Source, sources_of_file


def sentence(number: int, words: int = 14) -> str:
    return f"S{number} " + " ".join(f"w{number}x{word}" for word in range(words - 1)) + "."


TEXTS = {
    "one paragraph": " ".join(map(sentence, range(90))),
    "paragraphs": "\n\n".join(" ".join(sentence(10 * part + n) for n in range(6)) for part in range(12)),
    "no sentence": " ".join(f"w{n}" for n in range(1500)),
    "no space": "".join(f"{n:06}" for n in range(3000)),
    "Chinese": "".join(f"這是第{n}個測試句子。" for n in range(120)),
}


@pytest.mark.parametrize("kind", TEXTS)
def test_passages_hold_the_whole_text_in_order_and_in_reach(kind: str) -> None:
    text, end = TEXTS[kind], 0
    cut = passages(text)
    assert len(cut) > 3 and all(len(passage.split()) <= WORDS and len(passage) <= 21 * WORDS for passage in cut)
    for passage in cut:
        start = text.index(passage)
        assert start <= end or not text[end:start].strip()
        assert end - start <= 300  # of overlap, in characters
        end = start + len(passage)
    assert not text[end:].strip()


def test_borders_are_those_of_paragraphs_else_of_sentences_with_an_overlap() -> None:
    assert all(re.match(r"S\d*0 ", passage) and passage.endswith(".") for passage in passages(TEXTS["paragraphs"]))
    cut = passages(TEXTS["one paragraph"])
    assert all(passage.startswith("S") and passage.endswith(".") for passage in cut)
    assert all(first.split(". ")[-1].rstrip(".") in second for first, second in pairwise(cut))
    assert passages(" ".join(f"w{n}" for n in range(300))) == [" ".join(f"w{n}" for n in range(300))]


def test_a_long_file_is_items_that_name_it_and_a_short_one_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(TEXTS["paragraphs"], encoding="utf-8")
    found = [source for source in sources_of_file(path, "sub/notes.txt") if isinstance(source, Source)]
    items = [source.make_item()[0] for source in found]
    assert [item.id for item in items][:2] == ["sub/notes.txt#part=1", "sub/notes.txt#part=2"]
    fields = {name: value for name, value in items[1].fields.items() if name != STAT_FIELD}
    assert fields == {FILE_FIELD: str(path), "part": 2} and items[1].text == passages(TEXTS["paragraphs"])[1]
    path.write_text("short\n", encoding="utf-8")
    (source,) = sources_of_file(path, "sub/notes.txt")
    assert isinstance(source, Source) and source.make_item()[0].id == "sub/notes.txt"
    (failure,) = sources_of_file(path, "x" * 5000)
    assert isinstance(failure, Failure)
