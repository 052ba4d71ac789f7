"""What a Milvus collection holds for an item, and filters as Milvus expressions.

No text of a user ever enters an expression: ids and values are written as hex digits, which need no quoting and sort as what
they stand for does. A field `year` of 2020 is kept for display in the JSON text `fields`, and for filters as the dynamic field
`n_year` (`t_` texts, `n_` numbers, `b_` booleans); a name that is no plain word is spelt in hex after a capital (`T_`). The
values of a list are arrays under the letter doubled (`tt_`, `TT_`).
"""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from traceir.errors import InputError
from traceir.index import store
from traceir.index.filters import (
    MAX_IN_VALUES,
    OWN_NAMES,
    And,
    Filter,
    Glob,
    In,
    Kind,
    Leaf,
    Not,
    Or,
    Range,
    Scalar,
    Value,
    after_all,
    globs,
    is_list,
    kind_of,
    map_leaves,
    matches,
    shown,
    values_of,
    wanted_by_kind,
)
from traceir.index.words import columns_of
from traceir.items import MODALITIES, Item, Vector

KEY: Final = "key"
VECTOR: Final = "vector"
KEPT: Final = ("modality", "text", "image", "fields", "content_hash")
WORDS: Final = "words"
BM25: Final = "bm25"
MAX_KEY_CHARS: Final = 2 * store.MAX_ID_BYTES
MAX_VARCHAR_BYTES: Final = 65_535
MAX_DYNAMIC_BYTES: Final = 65_536
NOTHING: Final = f'{KEY} == ""'  # no item has an empty id
ANYTHING: Final = f'{KEY} != ""'
_PLAIN: Final = re.compile(r"[A-Za-z0-9_]{1,128}", re.ASCII)
_SIGN: Final = 1 << 63
_ALL_BITS: Final = (1 << 64) - 1


def key_of(id: str) -> str:
    return id.encode().hex()


def id_of(key: str) -> str:
    return bytes.fromhex(key).decode()


def row_of(item: Item, vector: Vector) -> dict[str, Any]:
    """The columns of an item; InputError where one is longer than Milvus takes. Reads images, for the content hash."""
    columns: dict[str, Any] = {
        KEY: key_of(str(item.id)),
        "modality": item.modality,
        "text": item.text,
        "image": store.image_of(item) or "",
        "fields": json.dumps(dict(item.fields), ensure_ascii=False),
        "content_hash": item.content_hash(),
        WORDS: as_milvus_words(itertools.chain(*columns_of(str(item.id), item.text, item.fields))),
    }
    dynamic = filter_columns(item.fields)
    lengths = [(name, len(columns[name].encode()), MAX_VARCHAR_BYTES) for name in ("text", "image", "fields")]
    for what, length, most in (*lengths, ("filter values", len(json.dumps(dynamic)), MAX_DYNAMIC_BYTES)):
        if length > most:
            raise InputError(
                f"the {what} of item {str(item.id)[:80]!r} take {length} bytes, more than the {most} that Milvus keeps; "
                "nothing was written: shorten them, or use an index in a folder"
            )
    return {**columns, **dynamic, VECTOR: vector}


def filter_columns(fields: Mapping[str, Value]) -> dict[str, str | list[str]]:
    """The dynamic fields by which an item is filtered; None has none, as a missing field has none."""
    columns: dict[str, str] = {}
    lists: dict[str, list[str]] = {}
    for name, value in fields.items():
        for part in values_of(value):
            if is_list(value):
                lists.setdefault(list_column_of(name, part), []).append(sortable(part))
            else:
                columns[column_of(name, part)] = sortable(part)
    return {**columns, **lists}


def stored_of(row: Mapping[str, Any]) -> store.Stored:
    """What was read of an item, with its vector where it was asked for; DamageError where it is not what is ever written."""
    try:
        vector = vector_of(row[VECTOR]) if VECTOR in row else None
        kept = (id_of(row[KEY]), row["modality"], row["text"] or None, row["image"] or None, row["fields"], row["content_hash"])
    except (KeyError, TypeError, ValueError) as error:
        what = f"the row of key {shown(row.get(KEY))} cannot be read ({type(error).__name__}: {error})"
        raise store.DamageError(f"{what}; drop the collection and fill it again") from error
    return store.stored_of(*kept, vector=vector)


def vector_of(value: Any) -> Vector:
    """A vector as a server returns it: a list of numbers, or the bytes of float16 in a list of one or bare."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes):
        value = value[0]
    if isinstance(value, bytes):
        return np.frombuffer(value, dtype="<f2").astype(np.float32)
    return np.asarray(value, dtype=np.float32)


def compile_filter(where: Filter | None) -> str:
    """A filter as a Milvus expression; the empty one matches everything. Its Globs must have been resolved (`resolve_globs`)."""
    return "" if where is None else _compile(where, negated=False)


def _compile(where: Filter, negated: bool) -> str:
    """`not` goes down to the single columns, of which a row may lack any: what Milvus makes of a missing one it does not say."""
    if isinstance(where, Not):
        return _compile(where.part, not negated)
    if isinstance(where, And | Or):
        parts = [f"({_compile(part, negated)})" for part in where.parts]
        joined_by_and = isinstance(where, And) != negated
        return (" and " if joined_by_and else " or ").join(parts) or (ANYTHING if joined_by_and else NOTHING)
    if isinstance(where, Glob):
        raise TypeError(f"{where} was not resolved")
    return _compile_range(where, negated) if isinstance(where, Range) else _compile_in(where.name, wanted_by_kind(where), negated)


def as_milvus_words(words: Iterable[str]) -> str:
    """Words as Milvus's analyzer cuts them again, those of other letters than a to z in hex; as many as Milvus keeps."""
    text = " ".join(word if word.isascii() else f"x{word.encode().hex()}" for word in words)
    return text if len(text) <= MAX_VARCHAR_BYTES else text[:MAX_VARCHAR_BYTES].rpartition(" ")[0]


def resolve_globs(where: Filter | None, texts_of: Callable[[str, bool], Iterable[str]]) -> Filter | None:
    """The same without Glob, for which Milvus has no exact counterpart.

    `texts_of` gives the texts that are there under a name, or those in lists alone.
    """

    def resolve(leaf: Leaf) -> Filter:
        if not isinstance(leaf, Glob):
            return leaf
        begins = Range(leaf.name, low=leaf.prefix, below=after_all(leaf.prefix))
        is_start = leaf.pattern == f"{leaf.prefix}*"
        if is_start and leaf.name in OWN_NAMES:
            return begins
        texts = {text for text in texts_of(leaf.name, is_start) if globs(leaf.pattern, text)}
        if len(texts) > MAX_IN_VALUES:
            what = f"filter Glob on {leaf.name!r} matches {len(texts)} different texts, and Milvus takes {MAX_IN_VALUES}"
            raise InputError(f"{what}; narrow the pattern, or use an index in a folder")
        among = In(leaf.name, tuple(sorted(texts)))
        return Or((begins, among)) if is_start else among

    return None if where is None else map_leaves(where, resolve)


def keys_in(keys: Sequence[str]) -> str:
    return _one_of(KEY, keys)


def column_of(name: str, value: Scalar) -> str:
    """The dynamic field that holds values of this kind under this name."""
    letter = kind_of(value)[0]
    return f"{letter}_{name}" if _PLAIN.fullmatch(name) else f"{letter.upper()}_{name.encode().hex()}"


def list_column_of(name: str, value: Scalar) -> str:
    """The dynamic field that holds the values of this kind of the list under this name."""
    column = column_of(name, value)
    return column[0] + column


def sortable(value: Scalar) -> str:
    """A value as text whose order, code point by code point, is that of the values of its kind; equal values, equal texts."""
    if isinstance(value, str):
        return value.encode().hex()
    if value is None or isinstance(value, bool):
        return str(int(value or 0))
    near = float(value)
    bits = struct.unpack(">Q", struct.pack(">d", near))[0]
    bits = 0 if bits == _SIGN else bits  # -0.0 is 0.0; by bits, because a processor may be set to take the smallest for 0
    ordered = bits ^ (_ALL_BITS if bits & _SIGN else _SIGN)
    # A 64-bit integer is at most 512 away from the nearest float, and integers in order have floats in order.
    rest = int(value) - int(near) if isinstance(value, int) else 0
    return f"{ordered:016x}{rest + 2048:03x}"


def _compile_in(name: str, wanted: Mapping[Kind, Sequence[Scalar]], negated: bool) -> str:
    if name in OWN_NAMES:
        names = [str(value) for value in wanted.get("text", ())]
        known = [key_of(own) for own in names] if name == "id" else [own for own in MODALITIES if own in names]
        return _negated(_one_of(KEY if name == "id" else name, known), negated)
    conditions = []
    for kind, values in wanted.items():
        if kind == "none":
            columns = [column(name, example) for example in ("", 0, False) for column in (column_of, list_column_of)]
            conditions.append(_negated(" and ".join(f"(not exists {column})" for column in columns), negated))
        else:
            texts, column = [sortable(value) for value in values], list_column_of(name, values[0])
            conditions.append(_negated(_one_of(column_of(name, values[0]), texts), negated, column_of(name, values[0])))
            conditions.append(_negated(f"json_contains_any({column}, [{_quoted(texts)}])", negated, column))
    joined = (" and " if negated else " or ").join(f"({condition})" for condition in conditions)
    return joined or (ANYTHING if negated else NOTHING)


def _compile_range(leaf: Range, negated: bool) -> str:
    bounds = leaf.bounds()
    if leaf.name in OWN_NAMES and kind_of(bounds[0][0]) != "text":
        return ANYTHING if negated else NOTHING
    if leaf.name == "modality":
        return _negated(_one_of("modality", [name for name in MODALITIES if matches(leaf, "", name, {})]), negated)
    column = KEY if leaf.name == "id" else column_of(leaf.name, bounds[0][0])
    compared = " and ".join(f'{column} {sign} "{sortable(bound)}"' for bound, sign in bounds)
    return _negated(compared, negated, "" if leaf.name == "id" else column)


def _negated(condition: str, negated: bool, column: str = "") -> str:
    """The condition, or its opposite, which holds also where the row lacks the column."""
    if not negated:
        return condition
    return f"(not exists {column}) or (not ({condition}))" if column else f"not ({condition})"


def _one_of(column: str, values: Sequence[str]) -> str:
    return f"{column} in [{_quoted(values)}]" if values else NOTHING


def _quoted(values: Sequence[str]) -> str:
    return ", ".join(f'"{value}"' for value in values)
