"""The ablations as data, read from ablations.toml, which says what each field means."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from traceir.errors import InputError
from traceir.items import Route
from traceir.suggest import did_you_mean

Kind = Literal["complex", "simple"]
"""The two evaluation rows: one of complex queries, one of simple ones."""
Metric = Literal["R@1", "R@5", "R@10", "speed"]
"""Recall in percent; speed in multiples of the direct route's queries per second."""
Figures = Mapping[tuple[Kind, Metric], float]


@dataclass(frozen=True, slots=True)
class Variant:
    """One run. `pipeline` and `speed` train nothing: they evaluate or time the runs that they use."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    routes: tuple[Route, ...] = ("auto",)
    preset: str = ""
    work: Literal["train", "pipeline", "speed"] = "train"
    uses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AblationLine:
    label: str
    variant: Variant
    route: Route = "auto"
    paper: Figures = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`better` and `worse` are labels of lines."""

    better: str
    worse: str
    kind: Kind = "complex"
    metric: Metric = "R@5"


@dataclass(frozen=True, slots=True)
class Claim:
    text: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """`paper` is "" for a question of ours, `speed` the run that times the lines."""

    id: str
    title: str
    paper: str
    lines: tuple[AblationLine, ...]
    claims: tuple[Claim, ...]
    against: str
    about: str = ""
    speed: Variant | None = None

    @property
    def variants(self) -> list[Variant]:
        """Each run of the table once, in the order of its lines."""
        runs = [line.variant for line in self.lines] + ([self.speed] if self.speed is not None else [])
        return list({variant.name: variant for variant in runs}.values())

    def line(self, label: str) -> AblationLine:
        return next(line for line in self.lines if line.label == label)


def choose_tables(names: Sequence[str]) -> list[Table]:
    """The named tables in the order of TABLES; `all` stands for every one. InputError for an unknown name."""
    known = [table.id for table in TABLES]
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise InputError(
            f"table {unknown[0]!r} is unknown{did_you_mean(unknown[0], known)}; choose all, or among {', '.join(known)}"
        )
    if not names:
        raise InputError(f"no table is named; choose all, or among {', '.join(known)}")
    return [table for table in TABLES if "all" in names or table.id in names]


def _variant(name: str, about: Mapping[str, Any]) -> Variant:
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in about.items()}
    return Variant(name, **fields)


def _table(about: Mapping[str, Any]) -> Table:
    measure = next(line for line in about["lines"] if line["label"] == about["against"])
    lines = [line | {"variant": VARIANTS[line["variant"]], "paper": _figures(line, measure)} for line in about["lines"]]
    claims = [Claim(claim["text"], tuple(Comparison(*row) for row in claim["holds"])) for claim in about["claims"]]
    whole = {"paper": "", **about, "lines": tuple(AblationLine(**line) for line in lines), "claims": tuple(claims)}
    return Table(**whole | {"speed": VARIANTS[about["speed"]] if "speed" in about else None})


def _figures(line: Mapping[str, Any], measure: Mapping[str, Any]) -> Figures:
    """The paper's figures of a line; its speeds are divided by those of the line that differences are taken to."""
    figures: dict[str, float] = dict(line.get("paper", {}))
    recalls: Any = figures.pop("cirr", ())
    figures |= dict(zip(("complex R@1", "complex R@5", "complex R@10"), recalls, strict=False))
    own: dict[Any, float] = {tuple(name.split()): value for name, value in figures.items()}
    return {key: value / measure["paper"][" ".join(key)] if key[1] == "speed" else value for key, value in own.items()}


_SOURCE: Final = tomllib.loads(Path(__file__).with_name("ablations.toml").read_text(encoding="utf-8"))
VARIANTS: Final[Mapping[str, Variant]] = {name: _variant(name, about) for name, about in _SOURCE["variants"].items()}
TABLES: Final[tuple[Table, ...]] = tuple(_table(about) for about in _SOURCE["tables"])
TIMED: Final[tuple[tuple[str, Route], ...]] = tuple((name, route) for name, route in _SOURCE["timed"])
"""What the run `speed` times: variant and route. The first is the measure of the others."""
