"""Tables as Markdown, for every report of the package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown_table(columns: Sequence[str], align: str, rows: Iterable[Sequence[object]]) -> str:
    """The rows below their header; `align` has a letter for each column, `l` or `r`. Cells are Markdown as it is; None is `–`."""
    rules = ["---:" if letter == "r" else "---" for letter in align]
    lines = [[str("–" if cell is None else cell) for cell in row] for row in rows]
    width = len(columns)
    assert len(rules) == width and all(len(line) == width for line in lines), "each row has a cell for each column"
    return "\n".join([_line(columns), f"|{'|'.join(rules)}|", *map(_line, lines)])


def percent(share: float | None, digits: int = 1) -> str:
    """A share in per cent, `–` where there is none."""
    return "–" if share is None else f"{100 * share:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"|{''.join(f' {cell} |' if cell else ' |' for cell in cells)}"
