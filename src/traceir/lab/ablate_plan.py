"""The plan of the ablations: which runs a set of tables needs, in which order and place, and what decides their results.

`ablation.json` in OUT keeps the base configuration, seeds and rows; what is there is never mixed with another configuration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from traceir.errors import DataError, InputError
from traceir.files import write_whole
from traceir.lab.ablations import Table, Variant
from traceir.lab.mini_presets import PRESETS
from traceir.train.config import FREE, TrainConfig, modern

FORMAT: Final = 1
ROWS: Final = ("cirr_task7", "mscoco_task3")
"""The complex row and the simple one."""
NEUTRAL: Final = frozenset({*FREE, "out", "save_every", "store_pixels", "checkpointing"})
"""Fields of a configuration that do not decide its result."""


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
    ordered = sorted(variants.values(), key=lambda variant: bool(variant.uses))  # stable: those that need others come last
    runs = [
        AblationRun(variant, seed, run_folder(out, variant.name, seed), configure(variant, base, seed, out), tuple(rows),
            tuple(run_folder(out, name, seed) for name in variant.uses))
        for seed in seeds
        for variant in ordered
        if variant.name not in skipped
    ]  # fmt: skip
    return runs, skipped


def run_folder(out: Path, variant: str, seed: int) -> Path:
    return out / "runs" / variant / f"seed{seed}"


def configure(variant: Variant, base: TrainConfig, seed: int, out: Path) -> TrainConfig:
    """The base with the variant's fields, this seed, and its place below `out`; images are cached once for all."""
    if unknown := sorted(set(variant.settings) - {field.name for field in fields(base)}):
        raise InputError(f"variant {variant.name} sets {', '.join(unknown)}, which a training configuration does not have")
    config = replace(base, **variant.settings)
    if variant.preset:
        other = PRESETS[variant.preset]()
        config = replace(config, init=other.init, size=other.size)
    cache = base.cache or str(out / "pixels")
    return replace(config, seed=seed, out=str(run_folder(out, variant.name, seed)), cache=cache)


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
