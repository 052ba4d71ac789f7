"""TraceIR inside other projects' frameworks; each module needs the package it is named after."""

from __future__ import annotations

from collections.abc import Sequence

from traceir.errors import InputError
from traceir.items import Item


def text_items(texts: Sequence[str]) -> list[Item]:
    """Candidates of one text each. InputError names the place of a text that holds nothing."""
    for place, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"text {place} (from 0) of {len(texts)} is empty; leave it out, or write it")
    return [Item.of(text=text) for text in texts]
