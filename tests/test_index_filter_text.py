"""Filters as text: what is read, what old conditions still mean, and what is refused where."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traceir.errors import InputError
from traceir.index.filter_text import as_filter, parse_filter
from traceir.index.filters import And, Eq, Filter, Glob, In, Not, Or, Range, matches

READ: list[tuple[str, Filter]] = [
    ("title=red cup", Eq("title", "red cup")), ("title=salt and pepper", Eq("title", "salt and pepper")),
    ("taken by = Ada ", Eq("taken by", "Ada")), ("title=", Eq("title", "")), ("title=smile :)", Eq("title", "smile :)")),
    ("year=1999", In("year", ("1999", 1999))), ("x=null", In("x", ("null", None))), ("x=true", In("x", ("true", True))),
    ("x=NaN", Eq("x", "NaN")), ('year="1999"', Eq("year", "1999")), ("""q='say "it''s"'""", Eq("q", 'say "it\'s"')),
    ('"a and b">3', Range("a and b", above=3)), ("w>=-5", Range("w", low=-5)), ("w<2e3", Range("w", below=2000.0)),
    ("title>m", Range("title", above="m")), ('w<="100"', Range("w", high="100")), ("x!=red", Not(Eq("x", "red"))),
    ("x in (a b, 'c, d', 1)", In("x", ("a b", "c, d", "1", 1))), ("x in ()", In("x", ())), ("x IN(a)", In("x", ("a",))),
    ("x is missing", Eq("x", None)), ("x is  not missing", Not(Eq("x", None))), ('id~"2024/*"', Glob("id", "2024/*")),
    ("camera ~ Pixel*", Glob("camera", "Pixel*")), ("x in y=z", Eq("x in y", "z")),
    ("note=a", Eq("note", "a")), ("not=a", Eq("not", "a")),
    ("a=x and b=y or not c=z", Or((And((Eq("a", "x"), Eq("b", "y"))), Not(Eq("c", "z"))))),
    ("a=x AND (b=y OR c=z)", And((Eq("a", "x"), Or((Eq("b", "y"), Eq("c", "z")))))),
    ("(a=x (y) or b=z)", Or((Eq("a", "x (y)"), Eq("b", "z")))), ("a=x and(b=y)", And((Eq("a", "x"), Eq("b", "y")))),
    ("a=this or that or b is missing", Or((Eq("a", "this or that"), Eq("b", None)))),
    ("a='x' and not not b='y'", And((Eq("a", "x"), Not(Not(Eq("b", "y")))))),
    ("date>=2024-05", Range("date", low="2024-05", below=":")), ("date<=2024-05", Range("date", low="0", below="2024-06")),
    ("date>2024-12-31", Range("date", low="2024-12-32", below=":")), ("date=2024-05", Eq("date", "2024-05")),
    ("date<2024-05-01T10:30", Range("date", low="0", below="2024-05-01T10:30")),
    ("year>1999", Or((Range("year", above=1999), Range("year", low="199:", below=":")))),
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), READ)
def test_a_text_is_read(text: str, expected: Filter) -> None:
    assert parse_filter(text) == expected == as_filter(text) and as_filter(expected) is expected and as_filter(None) is None


def test_dates_stand_for_their_periods() -> None:
    days = ["2023-12-31", "2024-05", "2024-05-01", "2024-05-31T23:59:59", "2024-06-01", "2024-10-01", "unknown", 2024, None]
    for text, expected in {
        "date<=2024-05": "0 1 2 3", "date>2024-05": "4 5", "date>=2024-05": "1 2 3 4 5", "date<2024-05": "0",
        "date>=2024": "1 2 3 4 5 7", "date<=2023": "0", "date<=2024-05-31": "0 1 2 3", "not date>=2024": "0 6 8",
        "date>2024-05-31T23:59": "4 5", "date>=2024-05 and date<=2024-05": "1 2 3",
    }.items():  # fmt: skip
        found = [n for n, day in enumerate(days) if matches(parse_filter(text), "x", "text", {"date": day})]
        assert " ".join(map(str, found)) == expected, text


@pytest.mark.parametrize(("text", "why"), [
    ("", "at its end.*condition is missing"), ("a", "operator is missing; write FIELD=VALUE"), ("a>", "value is missing"),
    ("a==1", "at character 3, after 'a=' and before '=1': two operators"), ("(a=1", "close the one of character 1"),
    ('a="x', "character 3.*quote is not closed"), ('a="x" y', "character 7, after 'a=\"x\" ' and before 'y'"),
    ("x in (a", "list is not closed"), ("x in (a,,b)", "character 9.*value is missing"), ("a=1 and", "no condition follows"),
    ("camera=Pixel and focal length>50", "character 8.*name of several words.*quote the name"),
    ("width>100 and heigth", "character 7.*looks like more than a value.*quote"), ("date>=2024 adn x=1", "more than a value"),
    ("x ! y", "operator is missing"), ("x !~ y", "operator is missing"), (">3", "condition is missing"), ("and a=1", "condition"),
    ("()", "character 2"), ("not", "condition is missing"), ("(" * 99 + "a=1", "16 levels"), ("not " * 99 + "a=1", "16 levels"),
    ("a=\0", "zero|use text"), (" or ".join(f"a{n}=1" for n in range(300)), "before 'a256=1.*more than 256 conditions"),
    ("(" + " and ".join("a=1 or b=1" for _ in range(200)), "more than 256 conditions"),
    ("x in (" + "y," * 20_000, "at character 20008.*more than 10000 values"),
    ("a~" + "x" * 5000, "5000 characters"),
])  # fmt: skip
def test_what_cannot_be_read_is_refused_with_its_place(text: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        parse_filter(text)


@pytest.mark.slow
@given(st.text(alphabet="ab =!<>~()\"',.*? andornotinismissing2024-05", max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        where = parse_filter(text)
    except InputError:
        return
    matches(where, "a", "text", {"a": "b", "b": 1})


def test_parts_that_are_no_filters_and_deep_ones_are_refused() -> None:
    parts: Any
    for parts, why in (((None,), "part None"), (("a=1",), "not a filter"), ("a=1", "give a tuple"), (5, "give a tuple")):
        for kind in (And, Or):
            with pytest.raises(InputError, match=why):
                kind(parts)
    deep: Filter = Eq("a", 1)
    with pytest.raises(InputError, match="16 deep"):
        for _ in range(20):
            deep = Not(deep)
    for build in (lambda: Not(None), lambda: Range("a"), lambda: Range("a", low=1, above="x"), lambda: Glob("a", 5)):
        with pytest.raises(InputError):
            build()


@pytest.mark.parametrize(
    "text", ["a=" + " " * 200_000 + "x", "a=" + " and" * 50_000, "x in (" + "(" * 100_000, "a~" + "*a" * 2000]
)
def test_hostile_texts_are_read_in_time(text: str) -> None:
    """In days, where their time is a power of their length."""
    with contextlib.suppress(InputError):
        matches(parse_filter(text), "x", "text", {"a": "a" * 4000})
