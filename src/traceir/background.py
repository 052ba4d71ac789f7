"""Queries that a collection almost surely cannot answer: the background against which scores are judged (`retrieval/cutoff.py`).

Built in (background.json) are short texts of several unrelated things each ("a walrus tuning a harp in a car park"), drawn by a
seed: a collection may hold parts of such a text, which only makes thresholds stricter, but not the whole. A checkpoint that knows
a world of its own may bring `background.txt` in that world's words. Queries that users asked without success are better still.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from traceir.collection.sources import Failure, Source, find_sources
from traceir.errors import InputError
from traceir.items import Query
from traceir.outside import lines_of

COUNT: Final = 2000
"""Queries: enough for a rate of 1 in 1000 over two modalities."""
FILE_NAME: Final = "background.txt"


def built_in(count: int = COUNT, seed: int = 0) -> list[Query]:
    """`count` different texts; the first n of equal seeds are equal, whatever the count. InputError for more than there are."""
    if not 1 <= count <= 100_000:
        raise InputError(f"{count} built-in queries cannot be drawn; ask for 1 to 100000")
    words = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    draw = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < count:
        first, second, third = (f"{'an' if noun[0] in 'aeio' else 'a'} {noun}" for noun in draw.sample(words["things"], 3))
        text = draw.choice(words["forms"]).format(first, draw.choice(words["deeds"]), second, draw.choice(words["places"]), third)
        texts[text] = None
    return [Query.of(text=text) for text in texts]


def choose_queries(
    paths: Sequence[Path], model: Path, *, count: int = COUNT, instruction: str | None = None
) -> tuple[list[Query], str]:
    """The queries to calibrate with, and what they are in words.

    Texts are those of the paths, else those of the checkpoint's own `background.txt`, else the built-in ones: the first `count`.
    Images are those of the paths; where no query of both is, each image is also asked beside one of the texts.
    """
    queries = [query for path in paths for query in read_queries(path)]
    sources = [path.name for path in paths]
    own = model / FILE_NAME
    if not any(query.modality == "text" for query in queries):
        queries += (read_queries(own) if own.is_file() else built_in(count))[:count]
        sources.append(f"{FILE_NAME} of the model" if own.is_file() else "built in")
    texts, images = ([query for query in queries if query.modality == kind] for kind in ("text", "image"))
    if not any(query.modality == "image,text" for query in queries):
        queries += [Query((*image.parts, *texts[number % len(texts)].parts)) for number, image in enumerate(images)]
    return [replace(query, instruction=instruction) for query in queries], ", ".join(sources)


def read_queries(path: Path) -> list[Query]:
    """Queries of a file or folder: a .txt file holds one text a line; all else is read as `traceir index add` reads items.

    InputError naming what of it cannot be read: with some of them left out the rate would be another than the one promised.
    """
    if path.suffix.lower() == ".txt" and path.is_file():
        lines = dict.fromkeys(line.strip() for line in lines_of(path, "query") if line.strip())
        queries = [Query.of(text=line) for line in lines]
    else:
        queries = []
        for outcome in find_sources([path]):
            if isinstance(outcome, Failure):
                raise InputError(f"{outcome.location}: {outcome.reason}")
            if isinstance(outcome, Source):
                queries.append(_query_of(outcome))
    if not queries:
        raise InputError(f"{path} holds no query; give images, a .jsonl file, or a .txt file of one text a line")
    return queries


def _query_of(source: Source) -> Query:
    try:
        return Query(source.make_item()[0].parts, id=source.id)
    except InputError as error:
        raise InputError(f"{source.location}: {error}") from error
