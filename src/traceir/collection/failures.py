"""Why files could not be read: an index remembers it in its notes, so that the next run tells it without reading them again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from itertools import count, takewhile
from typing import Final

from traceir import __version__
from traceir.collection.records import Failure
from traceir.index.store import MAX_NOTE_BYTES, Index

Failures = dict[str, tuple[str, list[Failure]]]
"""By path: the stat of a file, and what could not be made of it."""
NOTE: Final = "failures-"
"""With a number: notes of JSON {readers, files: {path: [stat, [[location, reason], ...]]}}."""
OPTIONAL: Final = ("pillow_heif", "rawpy", "pypdfium2", "av")
"""What reads further kinds of files: once one is installed, files that failed are tried again."""
_MOST_OF_FILE: Final = 20


def read_failures(index: Index) -> Failures:
    """What was kept; without what other readers could not read, or what is damaged."""
    failures: Failures = {}
    readers = _readers()
    texts = (index.note(f"{NOTE}{number}") for number in count())
    for text in takewhile(bool, texts):
        with suppress(ValueError, KeyError, TypeError, AttributeError):
            kept = json.loads(str(text))
            for path, (stat, failed) in kept["files"].items() if kept["readers"] == readers else ():
                failures[path] = str(stat), [Failure(*failure) for failure in failed]
    return failures


def keep_failures(index: Index, failures: Mapping[str, tuple[str, Sequence[Failure]]]) -> None:
    """Keep these in place of those before. Of one file the first 20 are told."""
    notes: list[str] = []
    files: list[str] = []
    for path, (stat, failed) in sorted(failures.items()):
        told = [(failure.location, failure.reason[:1000]) for failure in failed[:_MOST_OF_FILE]]
        entry = f"{json.dumps(path)}: {json.dumps([stat, told])}"
        if files and sum(map(len, files)) + len(entry) > MAX_NOTE_BYTES - 2000:
            notes.append(_note(files))
            files = []
        files.append(entry)
    notes += [_note(files)] if files else []
    for number in count():
        text, before = notes[number] if number < len(notes) else "", index.note(f"{NOTE}{number}") or ""
        if text != before:
            index.keep_note(f"{NOTE}{number}", text)
        if not text and not before:
            return


def _note(files: Sequence[str]) -> str:
    return f'{{"readers": {json.dumps(_readers())}, "files": {{{", ".join(files)}}}}}'


def _readers() -> str:
    """What reads files here, which decides whether one that failed may be read now."""
    return " ".join([__version__, *filter(find_spec, OPTIONAL)])
