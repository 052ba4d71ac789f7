"""Filters as text, in the one language of command line, server, page and Python.

    date>=2024-05 and (place=Oslo or not camera~"Pixel*") and width in (100, 200) and title is missing

Operators are `= != < <= > >= ~ in` and `is missing` (`is not missing`); `not` binds tighter than `and`, `and` than `or`. `~` is a
`Glob`: `*` and `?` over the whole text. `a!=1` is `not a=1`, so what lacks the field passes.

A bare value needs no quotes: it runs up to the next `and` or `or` that a condition follows, or to the closing parenthesis, so
`title=salt and pepper` is one condition. Where it reads as a number, true, false or null, it matches that value and the text; in
an order the number alone. A value in quotes, "..." or '...', is the text alone; a quote within is written twice. Names with other
characters than letters, digits and `_ . : / -` are quoted too.

Dates are texts such as 2024-05-01T10:30. In an order, a bare value of the form YYYY, YYYY-MM, YYYY-MM-DD or with a time after it
stands for its whole period: `date<=2024-05` and `not date>2024-05` have all of May, `date=2024-05` is that text exactly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Final, NoReturn

from traceir.errors import InputError
from traceir.index.filters import (
    MAX_CONDITIONS,
    MAX_DEPTH,
    MAX_IN_VALUES,
    MAX_TEXT_BYTES,
    And,
    Eq,
    Filter,
    Glob,
    In,
    Not,
    Or,
    Range,
    Scalar,
    Where,
    after_all,
    is_value,
    kind_of,
    parts_of,
)

_QUOTED: Final = r"""(?:"(?:[^"]|"")*"|'(?:[^']|'')*')"""
_NAME: Final = rf"(?:{_QUOTED}|[^\s()\"'=!<>~,]+)"
_SIGN: Final = r"(?:!=|<=|>=|[=<>~])"
_WORD_SIGN: Final = r"(?:in\b(?=\s*\()|is\s+(?:not\s+)?missing\b)"
_SPACE: Final = re.compile(r"\s*")
_OPERATOR: Final = re.compile(rf"\s*({_SIGN}|{_WORD_SIGN})", re.IGNORECASE)
_JOINED: Final = re.compile(
    rf"(?<![^\s)])(?:and|or)\b\s*(?=(?:not\b\s*|\(\s*)*{_NAME}\s*(?:{_SIGN}|(?<=\s){_WORD_SIGN}))", re.IGNORECASE
)
"""An `and` or `or` that a condition follows."""
_NAME_END: Final = re.compile(rf"{_SIGN}|[()\"',!]|(?<=\s){_WORD_SIGN}", re.IGNORECASE)
_DATE: Final = re.compile(r"\d{4}(-\d\d(-\d\d(T\d\d:\d\d(:\d\d(\.\d+)?)?)?)?)?", re.ASCII)
_FORM: Final = "write FIELD=VALUE, with = != < <= > >= ~ in (...) or `is missing`, joined by and, or, not"


def as_filter(where: Where) -> Filter | None:
    """The same, read where it is a text; InputError for what is neither."""
    if isinstance(where, str):
        return parse_filter(where)
    parts_of(where)
    return where


def parse_filter(text: str) -> Filter:
    """The filter that a text describes; InputError, with the place in the text, where it describes none."""
    if len(text) > MAX_TEXT_BYTES:
        raise InputError(f"the filter has {len(text)} characters; give at most {MAX_TEXT_BYTES}, or ask several times")
    parser = _Parser(text)
    where = parser.any_of(0)
    if parser.at < len(text):
        parser.refuse("something after the end of a condition", "join conditions by and, or; quote a value that has parentheses")
    return where


class _Parser:
    """Reads from `at` on; each method leaves it behind what it has read and the space after it."""

    def __init__(self, text: str) -> None:
        self.text, self.at, self.conditions = text, 0, 0
        self._skip(_SPACE)

    def any_of(self, depth: int) -> Filter:
        return self._joined("or", Or, lambda: self._joined("and", And, lambda: self._single(depth)))

    def _joined(self, word: str, kind: type[And | Or], read: Callable[[], Filter]) -> Filter:
        parts = [read()]
        while self._skip(re.compile(rf"{word}\b\s*", re.IGNORECASE)):
            parts.append(read())
        return parts[0] if len(parts) == 1 else kind(parts)

    def _single(self, depth: int) -> Filter:
        if depth > MAX_DEPTH:
            self.refuse(f"more than {MAX_DEPTH} levels of parentheses and not", "write it flatter")
        if self._skip(re.compile(rf"not\b\s*(?!\s*{_SIGN})", re.IGNORECASE)):
            return Not(self._single(depth + 1))
        start = self.at
        if not self._skip(re.compile(r"\(\s*")):
            return self._condition(depth)
        where = self.any_of(depth + 1)
        if not self._skip(re.compile(r"\)\s*")):
            self.refuse("a parenthesis is not closed", f"close the one of character {start + 1}")
        return where

    def _condition(self, depth: int) -> Filter:
        self.conditions += 1
        if self.conditions > MAX_CONDITIONS:
            self.refuse(f"more than {MAX_CONDITIONS} conditions", "give fewer, put values into in (...), or ask several times")
        name = self._name()
        operator = " ".join((self._skip(_OPERATOR) or "").lower().split())
        if not operator:
            self.refuse("an operator is missing", _FORM)
        self._skip(_SPACE)
        if operator.startswith("is"):
            return Not(Eq(name, None)) if "not" in operator else Eq(name, None)
        if operator == "in":
            return In(name, tuple(value for bare, text in self._list() for value in _meanings(bare, text)))
        start = self.at
        bare, value = self._value(depth)
        if bare and re.search(r"(^|\s)(and|or)$", value, re.IGNORECASE):
            self.refuse("no condition follows `and` or `or`", f"{_FORM}; quote a value that ends so")
        if bare and re.search(r"\s(and|or)\s.*[=<>~]", value, re.IGNORECASE | re.DOTALL):
            self.refuse(
                "a name of several words stands behind `and` or `or`", f"{_FORM}; quote the name, or the whole value", start
            )
        if operator in ("=", "!="):
            meanings = _meanings(bare, value)
            equal = Eq(name, meanings[0]) if len(meanings) == 1 else In(name, tuple(meanings))
            return equal if operator == "=" else Not(equal)
        if bare and not value:
            self.refuse("a value is missing", 'write one after the operator, or "" for the empty text', start)
        if operator == "~":
            return Glob(name, value)
        if bare and re.search(r"\s(and|or)\s|[=<>~]", value, re.IGNORECASE):  # a misspelt condition, most likely
            self.refuse("the value looks like more than a value", f"{_FORM}; quote it if it is one", start)
        return _ordered(name, operator, bare, value)

    def _name(self) -> str:
        if self.text[self.at : self.at + 1] in ('"', "'"):
            return self._quoted()
        found = _NAME_END.search(self.text, self.at)
        end = found.start() if found else len(self.text)
        name = self.text[self.at : end].strip()
        if not name or re.match(r"(and|or)\b", name, re.IGNORECASE):
            self.refuse("a condition is missing", f"{_FORM}; a name may stand in quotes")
        self.at = end
        return name

    def _value(self, depth: int, ends: str = "") -> tuple[bool, str]:
        """Whether it is bare, and the text."""
        if self.text[self.at : self.at + 1] in ('"', "'"):
            value = self._quoted()
            self._skip(_SPACE)
            return False, value
        if self.text[self.at : self.at + 1] in tuple("=<>~!"):
            self.refuse("two operators follow each other", f"{_FORM}; quote a value that begins so")
        joined = None if ends else _JOINED.search(self.text, self.at)
        last = joined.start() if joined else len(self.text)
        start, level = self.at, 0
        while self.at < last:
            character = self.text[self.at]
            level += (character == "(") - (character == ")")
            if (level < 0 and (depth or ends)) or (not level and character in ends):
                break
            self.at += 1
        return True, self.text[start : self.at].strip()

    def _list(self) -> list[tuple[bool, str]]:
        self._skip(re.compile(r"\(\s*"))
        values: list[tuple[bool, str]] = []
        while not self._skip(re.compile(r"\)\s*")):
            if values and not self._skip(re.compile(r",\s*")):
                self.refuse("the list is not closed", "write it as in (a, b), and quote values with commas or parentheses")
            bare, value = self._value(0, ends=",")
            if bare and not value:
                self.refuse("a value is missing", 'write one, or "" for the empty text')
            values.append((bare, value))
            if len(values) > MAX_IN_VALUES:
                self.refuse(f"more than {MAX_IN_VALUES} values in one list", "give fewer, or ask several times")
        return values

    def _quoted(self) -> str:
        quoted = self._skip(re.compile(_QUOTED))
        if not quoted:
            self.refuse(
                "a quote is not closed", "close it; to use the character itself, put the value into the other kind of quotes"
            )
        return quoted[1:-1].replace(2 * quoted[0], quoted[0])

    def _skip(self, pattern: re.Pattern[str]) -> str:
        """What follows here, if it is of this form."""
        match = pattern.match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match[0] if match else ""

    def refuse(self, what: str, remedy: str, at: int | None = None) -> NoReturn:
        at = self.at if at is None else at
        before, after = self.text[max(0, at - 40) : at], self.text[at : at + 40]
        place = f"at character {at + 1}, after {before!r} and before {after!r}" if after else f"at its end, after {before!r}"
        raise InputError(f"the filter cannot be read {place}: {what}; {remedy}")


def _meanings(bare: bool, value: str) -> list[Scalar]:
    """The values that a value stands for where it is compared for equality."""
    try:
        read = json.loads(value) if bare else value
    except (ValueError, RecursionError):
        read = value
    return [value] if isinstance(read, str) or not is_value(read) else [value, read]


def _ordered(name: str, operator: str, bare: bool, value: str) -> Filter:
    numbers = [read for read in _meanings(bare, value) if kind_of(read) == "number"]
    if bare and _DATE.fullmatch(value):
        # All that begin with the text are its period. Texts that are no dates, such as "unknown", are outside every order.
        end, key = after_all(value), {"<": "below", "<=": "below", ">": "low", ">=": "low"}[operator]
        dates = Range(name, **{"low": "0", "below": ":", key: end if operator in ("<=", ">") else value})
        return Or((_bounded(name, operator, numbers[0]), dates)) if numbers else dates
    return _bounded(name, operator, numbers[0] if numbers else value)


def _bounded(name: str, operator: str, bound: Scalar) -> Range:
    return Range(name, **{{"<": "below", "<=": "high", ">": "above", ">=": "low"}[operator]: bound})
