"""Writes into README.md what `make demo` prints: `python -m benchmarks.readme` (tests/test_readme.py holds it to that)."""

from __future__ import annotations

import contextlib
import io
import re
import sys
import tempfile
from pathlib import Path
from typing import Final

from traceir.cli.main import main as traceir

README: Final = Path(__file__).parents[1] / "README.md"
SHOWN: Final = (11,)
"""Numbers of the demonstration's queries: a question of three hops."""
SAMPLE: Final = re.compile(r"(<!-- printed by python -m benchmarks\.readme -->\n```text\n)(.*?)(```)", re.DOTALL)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        printed = printed_by(["demo", "--out", folder, "--serve", "no"])
    text = README.read_text(encoding="utf-8")
    README.write_text(SAMPLE.sub(lambda match: match[1] + sample(printed) + match[3], text), encoding="utf-8")
    return 0


def printed_by(arguments: list[str]) -> str:
    """What a command prints; RuntimeError where it fails."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = traceir(arguments)
    if code != 0:
        raise RuntimeError(f"traceir {' '.join(arguments)} ended with {code}")
    return out.getvalue()


def sample(printed: str) -> str:
    """The answers to the queries of SHOWN, and the line that counts the right ones."""
    blocks = printed.split("\n\n")
    chosen = [block for number in SHOWN for block in blocks if block.startswith(f"{number}. ")]
    counted = next(line for line in printed.splitlines() if " queries have the right one first" in line)
    return "\n\n".join([*chosen, counted]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
