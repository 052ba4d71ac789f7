"""TraceIR inside other projects' frameworks; each module needs the package it is named after."""

from __future__ import annotations

from collections.abc import Sequence

from traceir.errors import InputError
from traceir.items import Encoding, Item
from traceir.retrieval.search import EncoderLike

Vectors = list[list[float]]


def embed_texts(encoder: EncoderLike, texts: Sequence[str]) -> Vectors:
    """Vectors of candidates of one text each. InputError names the index of an empty text."""
    for number, text in enumerate(texts):
        if not text.strip():
            raise InputError(f"text {number} (from 0) of {len(texts)} is empty; leave it out, or write it")
    return lists(encoder.encode_items([Item.of(text=text) for text in texts]))


def lists(encodings: Sequence[Encoding]) -> Vectors:
    return [encoding.vector.tolist() for encoding in encodings]
