"""The ablations as data (ablations.toml says what each field means), and the plan of their runs: which, in what order and folder.

`ablation.json` in OUT keeps the base configuration, seeds and rows; what is there is never mixed with another configuration.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import TypeAdapter

from traceir.errors import DataError, InputError
from traceir.files import write_whole
from traceir.items import Route
from traceir.lab.mini_presets import PRESETS
from traceir.suggest import did_you_mean
from traceir.train.config import FREE, TrainConfig, modern

FORMAT: Final = 1
ROWS: Final = ("cirr_task7", "mscoco_task3")
"""The complex row and the simple one."""
NEUTRAL: Final = frozenset({*FREE, "out", "save_every", "store_pixels", "checkpointing"})
"""Fields of a configuration that do not decide its result."""

Kind = Literal["complex", "simple"]
"""The two evaluation rows: one of complex queries, one of simple ones."""
Metric = Literal["R@1", "R@5", "R@10", "speed"]
"""Recall in percent; speed in multiples of the direct route's queries per second."""


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
    paper: Mapping[tuple[Kind, Metric], float] = field(default_factory=dict)


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
    wrong = [f"table {name!r} is unknown{did_you_mean(name, known)}" for name in names if name not in (*known, "all")]
    if wrong or not names:
        raise InputError(f"{wrong[0] if wrong else 'no table is named'}; choose all, or among {', '.join(known)}")
    return [table for table in TABLES if "all" in names or table.id in names]


def _table(about: dict[str, Any]) -> Table:
    """The paper's speeds of a line are divided by those of the line that differences are taken to."""
    measure = next(line for line in about["lines"] if line["label"] == about["against"])
    lines = []
    for line in about["lines"]:
        figures = dict(line.get("paper", {}))
        figures |= dict(zip(("complex R@1", "complex R@5", "complex R@10"), figures.pop("cirr", ()), strict=False))
        paper = {tuple(k.split()): v / measure["paper"][k] if k.endswith("speed") else v for k, v in figures.items()}
        lines.append(AblationLine(**line | {"variant": VARIANTS[line["variant"]], "paper": paper}))
    claims = [Claim(claim["text"], tuple(Comparison(*row) for row in claim["holds"])) for claim in about["claims"]]
    speed = VARIANTS[about["speed"]] if "speed" in about else None
    return Table(**{"paper": ""} | about | {"lines": tuple(lines), "claims": tuple(claims), "speed": speed})


_SOURCE: Final = tomllib.loads(Path(__file__).with_name("ablations.toml").read_text(encoding="utf-8"))
VARIANTS: Final[Mapping[str, Variant]] = TypeAdapter(dict[str, Variant]).validate_python(
    {name: {"name": name, **about} for name, about in _SOURCE["variants"].items()}
)
TABLES: Final[tuple[Table, ...]] = tuple(_table(about) for about in _SOURCE["tables"])
TIMED: Final[tuple[tuple[str, Route], ...]] = tuple((name, route) for name, route in _SOURCE["timed"])
"""What the run `speed` times: variant and route. The first is the measure of the others."""


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AblationRun:
    """One variant with one seed. `uses` are the folders of the runs whose checkpoints it needs, `rows` what it is scored on."""

    variant: Variant
    seed: int
    folder: Path
    config: TrainConfig
    rows: tuple[str, ...]
    uses: tuple[Path, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def failure(self) -> Path:
        return self.folder / "failed.json"

    @property
    def is_done(self) -> bool:
        return self.result.is_file()


def plan_runs(
    tables: Sequence[Table], out: Path, base: TrainConfig, seeds: Sequence[int], rows: Sequence[str]
) -> tuple[list[AblationRun], dict[str, str]]:
    """All runs in the order in which they are done, and the variants that cannot be run here with the reason."""
    variants = {variant.name: variant for table in tables for variant in table.variants}
    skipped = {name: reason for name, variant in variants.items() if (reason := obstacle(variant))}
    possible = [variant for name, variant in variants.items() if name not in skipped]
    possible.sort(key=lambda variant: bool(variant.uses))  # those that need others come last
    runs = []
    for seed, variant in itertools.product(seeds, possible):
        folder, *uses = (out / "runs" / name / f"seed{seed}" for name in (variant.name, *variant.uses))
        cache = base.cache or str(out / "pixels")  # images are cached once for all
        config = replace(configure(variant, base), seed=seed, out=str(folder), cache=cache)
        runs.append(AblationRun(variant, seed, folder, config, tuple(rows), tuple(uses)))
    return runs, skipped


def configure(variant: Variant, base: TrainConfig) -> TrainConfig:
    """The base with the variant's fields, and the start and size of its preset."""
    if unknown := sorted(set(variant.settings) - {field.name for field in fields(base)}):
        raise InputError(f"variant {variant.name} sets {', '.join(unknown)}, which a training configuration does not have")
    config = replace(base, **variant.settings)
    if not variant.preset:
        return config
    other = PRESETS[variant.preset]()
    return replace(config, init=other.init, size=other.size)


def obstacle(variant: Variant) -> str:
    """Why the variant cannot be run here; "" where it can."""
    if not variant.preset:
        return ""
    if variant.preset not in PRESETS:
        return f"there is no preset {variant.preset}"
    start = PRESETS[variant.preset]().init
    there = start == "random" or (Path(start) / "traceir.json").is_file()
    return "" if there else f"it starts from {start}, which is not there; train it first"


def identity(run: AblationRun) -> dict[str, Any]:
    """All that decides a result: decisive fields of the configuration, routes, rows, the model it starts from, the data."""
    return {
        "config": _decisive(run.config),
        "routes": list(run.variant.routes),
        "rows": list(run.rows),
        "start": _fingerprint(Path(run.config.init) / "traceir.json"),
        "data": _fingerprint(Path(run.config.data) / "meta.json"),
    }


def check_result(run: AblationRun) -> None:
    """InputError where the run's result is of another configuration, start or data; fields it does not know count as default."""
    if not run.is_done:
        return
    old, new = read_result(run.result)["identity"], identity(run)
    defaults = {field.name: field.default for field in fields(run.config) if field.default is not MISSING}
    changed = _changes(defaults | modern(old.pop("config")), new.pop("config")) + _changes(old, new)
    if changed:
        raise InputError(
            f"{run.result} is of another configuration ({'; '.join(changed)}); choose another --out, or remove "
            f"{run.folder} to run it again"
        )


def write_plan(out: Path, base: TrainConfig, seeds: Sequence[int], rows: Sequence[str]) -> None:
    """ablation.json, or the check that the one in `out` is of the same base configuration and rows; its seeds are added up."""
    file = out / "ablation.json"
    plan: dict[str, Any] = {"format": FORMAT, "base": _decisive(base), "seeds": sorted(set(seeds)), "rows": list(rows)}
    if file.is_file():
        old = read_result(file)
        if changed := _changes(plan["base"] | modern(old["base"]), plan["base"]):
            raise InputError(f"{out} holds ablations of another base configuration ({', '.join(changed)}); choose another --out")
        if old["rows"] != list(rows):
            raise InputError(f"{out} holds ablations on {old['rows']}, not {list(rows)}; choose another --out")
        plan["seeds"] = sorted({*old.get("seeds", []), *seeds})
    write_whole(file, json.dumps(plan, indent=1) + "\n")


def read_result(file: Path) -> dict[str, Any]:
    """A result.json or an ablation.json; DataError where it is not one of this format."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); remove it and run the ablation again") from error
    if content.get("format") != FORMAT:
        raise DataError(f"{file}: format is {content.get('format')!r}, this release reads {FORMAT}; run the ablation again")
    return content


def _decisive(config: TrainConfig) -> dict[str, Any]:
    """As JSON gives it back."""
    values: dict[str, Any] = json.loads(json.dumps({k: v for k, v in asdict(config).items() if k not in NEUTRAL}))
    return values


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [f"{key}: {old.get(key)!r} -> {value!r}" for key, value in new.items() if old.get(key) != value]


def _fingerprint(file: Path) -> str | None:
    content: dict[str, str] = json.loads(file.read_text()) if file.is_file() else {}
    return content.get("fingerprint")
