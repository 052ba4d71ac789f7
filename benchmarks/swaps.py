"""Every library that was tried in place of our own code, kept or refused, measured against it in one run.

    python -m benchmarks.swaps --before 97f03be [--only NAME,...] [--out JSON] [--markdown docs/results/swaps.md]

The rows are in swaps.toml. The code before is what git holds at `--before`, unpacked into a temporary folder; what replaced it is
that of `--after`. A library that was refused stands as a function of a few lines in swaps_search.py. Both sides run with this
interpreter, one thread each, in a process of their own with its own PYTHONPATH, warmed up; each round times one right after the
other, the order alternates, and a figure is the median of the rounds' ratios, old / new in CPU seconds of the process and its
children: above 1 the library is faster. A reason that is no speed is a check (swaps_checks.py) that runs the library and prints
what it saw, and `does not hold any more` where that is not the reason that was given. Lines are those of the named files at both
revisions, so also what else changed in them.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import logging
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

from benchmarks.revisions import Side, Sides, alternating, summary, unpack
from benchmarks.size import git
from benchmarks.swaps_checks import CHECKS
from benchmarks.train_shapes import machine
from traceir.errors import InputError, TraceError
from traceir.files import write_whole

ROOT: Final = Path(__file__).parents[1]
TITLES: Final = ("swap", "verdict", "lines", "CPU old / new: median (least to greatest)", "observed, or why not measured")
HEADER: Final = f"| {' | '.join(TITLES)} |\n{'|---' * len(TITLES)}|"
CHILD: Final = "import sys; from benchmarks.swaps_process import main; main(*sys.argv[1:])"
SHOWN: Final = (
    "faiss-cpu numpy torch scipy pandas duckdb pydantic pymilvus milvus-lite accelerate starlette limits httpx httpx2 openai"
).split()
"""Packages whose versions are told."""


@dataclass(frozen=True)
class Measure:
    """`run` of the module `of`, over both revisions, or ours and the library over `code`. `asks`: those that count, none: all.
    `rounds`: at most."""

    of: str
    run: str
    code: Literal["both", "before", "after"] = "both"
    asks: tuple[str, ...] = ()
    rounds: int = 99
    peak: bool = False
    settings: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Swap:
    """A row of swaps.toml."""

    name: str
    title: str
    verdict: Literal["kept", "refused"]
    files_before: tuple[str, ...] = ()
    files_after: tuple[str, ...] = ()
    measures: tuple[Measure, ...] = ()
    checks: tuple[str, ...] = ()
    note: str = ""
    not_measured: str = ""


@dataclass(frozen=True)
class Ratio:
    """What one ask came to; `equal`: whether both sides gave the same, None where that is not compared; `peaks` in MB."""

    before: float
    after: float
    ratio: float
    least: float
    greatest: float
    equal: bool | None
    peaks: tuple[int, int] | None

    def shown(self, name: str) -> str:
        differ = ", results differ" if self.equal is False else ""
        peaks = f", peak {self.peaks[0]} and {self.peaks[1]} MB" if self.peaks else ""
        figures = [f"{one:.2f}" if one >= 0.1 else f"{one:.1g}" for one in (self.ratio, self.least, self.greatest)]
        return f"{name} {figures[0]} ({figures[1]} to {figures[2]}{differ}{peaks})"


@dataclass(frozen=True)
class Row:
    """A swap's findings. `seen`: whether the reason held, and what was observed; `failed`: why it could not be measured."""

    swap: Swap
    lines: int | None
    ratios: dict[str, Ratio]
    seen: tuple[tuple[bool, str], ...]
    failed: str = ""

    def shown(self) -> str:
        lines = "in others" if self.swap.verdict == "kept" else ""
        lines = lines if self.lines is None else f"{self.lines:+,}".replace("-", "−")
        ratios = "; ".join(ratio.shown(name) for name, ratio in self.ratios.items())
        words = [text if holds else f"**does not hold any more**: {text}" for holds, text in self.seen]
        words += [f"not measured: {self.swap.not_measured}"] if self.swap.not_measured else []
        words += [f"**cannot be measured**: {self.failed}"] if self.failed else []
        words += [self.swap.note] if self.swap.note else []
        return " | ".join(("", self.swap.title, self.verdict(), lines, ratios, "; ".join(words), "")).strip().replace("  ", " ")

    def verdict(self) -> str:
        """The verdict, and beside it what the ratios say against it: no median for it, and one ask against it in every round."""
        found = self.ratios.values()
        if self.swap.verdict == "kept":
            against = all(one.ratio < 1 for one in found) and any(one.greatest < 1 for one in found)
            return "kept, **slower**" if against else "kept"
        against = all(one.ratio > 1 for one in found) and any(one.least > 1 for one in found)
        return "refused, **faster**" if against else "refused"


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(given)
    options.given = given
    swaps = chosen(read_swaps(), options.only)
    logging.raiseExceptions = False  # checks break handlers on purpose
    about = describe(options)
    print(f"{about}\n\n{HEADER}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        options.scratch = Path(scratch)
        sides = unpack(options.before, options.scratch / "before"), unpack(options.after, options.scratch / "after")
        for swap in swaps:
            rows.append(row := find_out(swap, sides, options))
            print(row.shown(), flush=True)
            if options.out:
                write_whole(options.out, json.dumps({"about": about, "rows": [asdict(one) for one in rows]}, indent=1) + "\n")
            if options.markdown:
                write_whole(options.markdown, page(rows, about, options))
    if failed := [row.swap.name for row in rows if row.failed]:
        print(f"cannot be measured: {', '.join(failed)}", file=sys.stderr)
        return 2
    kept = [row for row in rows if row.swap.verdict == "kept"]
    slow = [f"{row.swap.name}: {name}" for row in kept for name, one in row.ratios.items() if one.ratio < options.at_least]
    if slow:
        print(f"below {options.at_least}: {', '.join(slow)}", file=sys.stderr)
    return int(bool(slow))


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--before", required=True, metavar="REVISION")
    made.add_argument("--after", default="HEAD", metavar="REVISION")
    made.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="NAME,...", help="rows of swaps.toml")
    made.add_argument("--rounds", type=int, default=5)
    made.add_argument("--data", type=Path, default=Path("data/minibeir"), help="made by `traceir minibeir build`")
    made.add_argument("--rows", type=int, default=100_000, help="of the indexes")
    made.add_argument("--width", type=int, default=256)
    made.add_argument("--add", type=int, default=20_000, help="vectors of the bulk add")
    made.add_argument("--milvus-rows", type=int, default=10_000)
    made.add_argument("--samples", default="30000", metavar="N,...", help="of the quality report, such as 30000,120000 (minutes)")
    made.add_argument("--answers", type=int, default=2000, help="of a teacher")
    made.add_argument("--steps", type=int, default=12, help="of training")
    made.add_argument("--at-least", type=float, default=0.0, help="status 1 where a ratio of a swap that was kept is below")
    made.add_argument("--out", type=Path, metavar="JSON")
    made.add_argument("--markdown", type=Path, metavar="FILE.md")
    return made


def read_swaps() -> list[Swap]:
    read = tomllib.loads((ROOT / "benchmarks/swaps.toml").read_text(encoding="utf-8"))["swap"]
    swaps = []
    for row in read:
        measures = [one | {"asks": tuple(one.get("asks", ())), "settings": tuple(one.get("settings", {}).items())}
                    for one in row.get("measures", ())]  # fmt: skip
        plain = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        swaps.append(Swap(**plain | {"measures": tuple(Measure(**one) for one in measures)}))
    return swaps


def chosen(swaps: list[Swap], only: Sequence[str]) -> list[Swap]:
    names = [swap.name for swap in swaps]
    if unknown := set(only) - set(names):
        raise InputError(f"--only: {', '.join(sorted(unknown))} is not among {', '.join(names)}")
    return [swap for swap in swaps if not only or swap.name in only]


def describe(options: argparse.Namespace) -> str:
    about = machine("cpu")
    versions = ", ".join(f"{name} {version(name)}" for name in SHOWN)
    before, after = (git("rev-parse", "--short", one).strip() for one in (options.before, options.after))
    return (
        f"{before} against {after}, {datetime.now(UTC).date().isoformat()}: {about['processor']}, {about['cores']} shared cores "
        f"({platform.machine()}), one thread a side, Python {about['python']}; {versions}."
    )


def find_out(swap: Swap, sides: Sides, options: argparse.Namespace) -> Row:
    """The row with all that could be found out; what fails of it is told in the row."""
    ratios: dict[str, Ratio] = {}
    seen: list[tuple[bool, str]] = []
    lines, failed = None, ""
    try:
        if swap.files_before:
            lines = count_lines(options.after, swap.files_after) - count_lines(options.before, swap.files_before)
        for measure in swap.measures:
            ratios |= compare(measure, sides, options)
        seen += [CHECKS[check]() for check in swap.checks]
    except (TraceError, OSError, ImportError, subprocess.CalledProcessError) as error:
        failed = " ".join(str(error).split())[-300:]
    return Row(swap, lines, ratios, tuple(seen), failed)


def count_lines(revision: str, patterns: Sequence[str]) -> int:
    """Lines of the files that the patterns name at a revision; each pattern must name some."""
    names = git("ls-tree", "-r", "--name-only", revision, "src").splitlines()
    found: set[str] = set()
    for pattern in patterns:
        matched = fnmatch.filter(names, f"src/traceir/{pattern}")
        if not matched:
            raise InputError(f"{pattern} names no file at {revision}; mend the row in benchmarks/swaps.toml")
        found.update(matched)
    return sum(git("show", f"{revision}:{name}").count("\n") for name in found)


def compare(measure: Measure, sides: Sides, options: argparse.Namespace) -> dict[str, Ratio]:
    """The ratio of every ask of a measure that counts, both processes alive, one asked at a time."""
    if measure.code == "both":
        pair, roles = sides, ("before", "after")
    else:
        side = sides[measure.code == "after"]
        pair, roles = (side, replace(side, name="library")), ("ours", "library")
    with ExitStack() as stack:
        children = [stack.enter_context(worker(*one, measure, options)) for one in zip(pair, roles, strict=True)]
        by_side = {side.name: child for side, (child, _) in zip(pair, children, strict=True)}
        ratios = {}
        for ask in measure.asks or children[0][1]:
            came_out: dict[str, tuple[str | None, int]] = {}

            def seconds(side: Side, ask: str = ask, came_out: dict[str, Any] = came_out) -> float:
                spent, *came_out[side.name] = reply_of(by_side[side.name], side, measure.run, ask)
                return float(spent)

            pairs = alternating(min(measure.rounds, options.rounds), pair, seconds, f"{measure.run}: {ask}")
            (digest, peak), (other, other_peak) = (came_out[side.name] for side in pair)
            equal = None if digest is None or other is None else digest == other
            ratios[ask] = Ratio(**summary(pairs), equal=equal, peaks=(peak, other_peak) if measure.peak else None)
    return ratios


@contextmanager
def worker(
    side: Side, role: str, measure: Measure, options: argparse.Namespace
) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """A process of one side that has made its data and warmed up, and what it can be asked."""
    plain = {key: value for key, value in vars(options).items() if isinstance(value, int | float | str)}
    settings = plain | dict(measure.settings) | {
        "scratch": str(options.scratch), "data": str(options.data.resolve()), "unseen": str(ROOT / "tests/fixtures/unseen.zip")
    }  # fmt: skip
    environment = side.environment()
    environment["PYTHONPATH"] += os.pathsep + str(ROOT)
    command = [sys.executable, "-P", "-c", CHILD, measure.of, measure.run, role, json.dumps(settings)]
    errors = options.scratch / f"{measure.run}-{role}.txt"
    with errors.open("w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            command, env=environment, cwd=options.scratch, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
        )
    try:
        yield child, list(reply_of(child, side, measure.run))
    except InputError as error:
        raise InputError(f"{error}: {errors.read_text(encoding='utf-8', errors='replace')[-300:]}") from error
    finally:
        assert child.stdin is not None
        child.stdin.close()  # then it ends by itself, and what it has started with it
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def reply_of(child: subprocess.Popen[str], side: Side, run: str, ask: str = "") -> list[Any]:
    """The next line of a child, after it was asked; InputError where it has ended."""
    assert child.stdin is not None and child.stdout is not None
    try:
        if ask:
            print(ask, file=child.stdin, flush=True)
        line = child.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        raise InputError(f"{run} {ask} of {side.name} ended with {child.wait()} before it replied")
    return list(json.loads(line))


def page(rows: Sequence[Row], about: str, options: argparse.Namespace) -> str:
    """The Markdown file."""
    sizes = ("rounds", "rows", "width", "add", "milvus_rows", "samples", "answers", "steps")
    shown = ", ".join(f"{name.replace('_', ' ')} {getattr(options, name)}" for name in sizes)
    doubtful = [row for row in rows if "**" in row.shown()]
    parts = [
        "# Libraries in place of our own",
        f"    python -m benchmarks.swaps {shlex.join(options.given)}",
        f"{about} Other work shared the cores. Seeds are fixed in the scripts; {shown}.",
        "Ratios are old / new in CPU seconds of a process and its children, above 1 the library is faster; of a refused library "
        "old is ours and new the library. A figure is the median over rounds in one run, both sides in turn, warmed up, with the "
        "least and the greatest. Lines are those of the files named in `benchmarks/swaps.toml` at both revisions, templates and "
        "data included: also what else changed in them. What was observed is what the check saw in this run.",
        HEADER + "\n" + "\n".join(row.shown() for row in rows),
    ]
    if doubtful:
        parts.append("Doubtful by these figures: " + ", ".join(f"`{row.swap.name}`" for row in doubtful) + ".")
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (TraceError, OSError, subprocess.CalledProcessError) as failure:
        print(failure, file=sys.stderr)
        sys.exit(2)
