"""Cards and reports as Jinja2 templates, and the one place where text from elsewhere is escaped.

A template lies beside the code that fills it, named NAME.md.j2 or NAME.html.j2. Whatever `{{ ... }}` puts into it is escaped for
Markdown or HTML by that name, in one line without control characters, unless a filter has made it Markup already.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Final

from jinja2 import Environment, FileSystemLoader, StrictUndefined, pass_eval_context
from jinja2.nodes import EvalContext
from markupsafe import Markup

ROOT: Final = Path(__file__).parents[1]
"""Names of templates are paths from here: the package."""
_SPECIAL: Final = re.compile(r"([\\`*{}\[\]()<>#!|~&$@]|(?<![^\W_])_|_(?![^\W_]))")
"""An underscore between letters or digits is none."""
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def render(template: str, **values: object) -> str:
    """The text of a template, such as `cot/data_card.md.j2`, with these values."""
    return _environment().get_template(template).render(**values)


def line(text: object) -> str:
    """One line without control characters."""
    return _CONTROL.sub(" ", str(text)).strip()


def escape(text: object) -> str:
    """One line of Markdown that shows the text as it is, in a paragraph or in a table; Markup is Markdown already."""
    return str(text) if isinstance(text, Markup) else _SPECIAL.sub(r"\\\1", line(text))


def code(text: object) -> Markup:
    """One line for a code span: no backtick can end it, no bar a table's cell."""
    return Markup(re.sub(r"[`|]", "", line(text)))


def markdown_table(columns: Sequence[str], align: str, rows: Iterable[Sequence[object]]) -> str:
    """The rows below their header; `align` has a letter for each column, `l` or `r`. Cells are Markdown as it is; None is `–`."""
    rule = "|".join({"l": "---", "r": "---:"}[letter] for letter in align)
    lines = [columns, *(["–" if cell is None else str(cell) for cell in row] for row in rows)]
    assert all(len(line) == len(align) for line in lines), "each row has a cell for each column"
    header, *body = (f"|{''.join(f' {cell} |' if cell else ' |' for cell in line)}" for line in lines)
    return "\n".join([header, f"|{rule}|", *body])


def table(rows: Iterable[Sequence[object]], header: Sequence[object], align: str) -> Markup:
    """A Markdown table whose cells are escaped."""
    return Markup(markdown_table([*map(escape, header)], align, ([*map(escape, row)] for row in rows)))


def number(count: float) -> str:
    """With commas between thousands."""
    return f"{count:,}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(share: float | None, digits: int = 1) -> str:
    """A share in per cent without the sign, `–` where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f}"


def size(count: int) -> str:
    """Bytes in words, such as 1.5 MB."""
    amount, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if amount >= 1000:
            amount, unit = amount / 1000, larger
    return f"{amount:.{0 if unit == 'B' else 1}f} {unit}"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(ROOT),
        autoescape=lambda name: bool(name and name.endswith(".html.j2")),
        finalize=_escape_output,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"code": code, "table": table, "number": number, "percent": percent}
    return environment


@pass_eval_context
def _escape_output(context: EvalContext, value: object) -> object:
    """What a template puts out: for HTML Jinja2 escapes it afterwards, for Markdown it is escaped here."""
    if isinstance(value, Markup):
        return value
    if context.autoescape:
        return "".join(character if character.isprintable() else " " for character in str(value))
    return escape(value)
