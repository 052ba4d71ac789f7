"""An encoder through tasks and whole benchmarks of mteb: what can run is scored, kept and shown; what cannot is named.

`out` is a folder of results as mteb keeps them (`mteb.ResultCache(out)`), with our `results.json` and `results.md` beside them.
A task is scored once: whoever calls again, after any kill, goes on behind it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import chain
from math import isfinite
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Final, Literal

import datasets
import huggingface_hub.constants
import mteb
from mteb.abstasks import AbsTask, AbsTaskRetrieval
from mteb.cache import ResultCache
from mteb.results import TaskResult
from mteb.types import PromptType

from traceir.checkpoint import is_hub_id, plain_name
from traceir.data import markdown as md
from traceir.errors import DataError, InputError
from traceir.evaluation.mteb_model import TraceEncoder, modalities_of, register
from traceir.items import Modality
from traceir.suggest import did_you_mean

log = logging.getLogger(__name__)

FORMAT: Final = 1
State = Literal["scored", "kept", "skipped", "failed"]
"""`kept`: scored by an earlier call; `skipped`: it needs what the model does not read; `failed`: see the reason."""
_MTEBS_TASKS: Final = "mteb.tasks."
_NO_HUB: Final = "the data are not on this machine, and the hub does not answer"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one task: its main score and seconds as mteb gives them, or the reason why there is none."""

    task: str
    type: str
    metric: str
    state: State
    score: float | None = None
    seconds: float | None = None
    reason: str = ""


class Results(ResultCache):
    """mteb's folder of results, written so that a file is there whole or not at all; a broken one counts as none."""

    def load_task_result(self, task_name: str, *where: Any, **options: Any) -> TaskResult | None:
        try:
            return super().load_task_result(task_name, *where, **options)
        except (ValueError, KeyError) as error:  # json's and pydantic's errors are ValueErrors
            log.warning(
                "the result of %s in %s cannot be read (%s); it is scored anew", task_name, self.cache_path, _words(error)
            )
            return None

    def save_to_cache(self, task_result: TaskResult, model_name: Any, *where: Any, **options: Any) -> None:
        """As mteb writes, elsewhere; then each file is moved here, the result last."""
        target = self.get_task_result_path(task_result.task_name, model_name, *where)
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory() as scratch:
            elsewhere = ResultCache(scratch)
            fresh = elsewhere.get_task_result_path(task_result.task_name, model_name, *where)
            fresh.parent.mkdir(parents=True)
            settings = target.parent / "run_settings.jsonl"  # mteb merges into it
            if settings.is_file():
                shutil.copyfile(settings, fresh.parent / settings.name)
            elsewhere.save_to_cache(task_result, model_name, *where, **options)
            for file in sorted(fresh.parent.iterdir(), key=lambda file: file == fresh):
                _replace(target.parent / file.name, file.read_text(encoding="utf-8"))


def choose_tasks(benchmarks: Sequence[str], names: Sequence[str], module: str | None = None) -> list[AbsTask]:
    """The tasks of mteb's benchmarks, those of these names, and those of a Python module or file, each once.

    With names, a module only adds to what a name may mean. InputError for what neither mteb nor the module has.
    """
    own = {task.metadata.name: task for task in (tasks_of(_module(module)) if module else [])}
    found = [task for name in benchmarks for task in _benchmark(name).tasks]
    found += [own.get(name) or _task(name, own) for name in names]
    if own and not names:
        found += own.values()
    return list({task.metadata.name: task for task in found}.values())


def tasks_of(module: ModuleType) -> list[AbsTask]:
    """mteb tasks among the names of a module: instances as they are, classes made; not mteb's own, imported to build on."""
    found = []
    for value in vars(module).values():
        if isinstance(value, AbsTask):
            found.append(value)
        elif isinstance(value, type) and issubclass(value, AbsTask) and _is_own(value):
            found.append(value())
    if not found:
        raise InputError(f"{module.__name__} defines no mteb task; it needs a subclass of an AbsTask class with metadata")
    return found


def _is_own(kind: type[AbsTask]) -> bool:
    return getattr(kind, "metadata", None) is not None and not kind.__module__.startswith(_MTEBS_TASKS)


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise InputError(f"--tasks-from {name}: {error}; give a module that Python finds, or a .py file") from error
    spec = importlib.util.spec_from_file_location(f"tasks_from_{Path(name).stem}", name)
    if spec is None or spec.loader is None or not Path(name).is_file():
        raise InputError(f"--tasks-from {name}: there is no such file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and others look themselves up
    spec.loader.exec_module(module)
    return module


def _benchmark(name: str) -> Any:
    try:
        return mteb.get_benchmark(name)
    except KeyError as error:
        known = [one.name for one in mteb.get_benchmarks()]
        raise InputError(
            f"mteb has no benchmark {name!r}{did_you_mean(name, known)}; list them with `mteb available-benchmarks`"
        ) from error


def _task(name: str, own: Mapping[str, AbsTask]) -> AbsTask:
    try:
        return mteb.get_task(name)
    except KeyError as error:
        from mteb.get_tasks import TASK_LIST

        known = [*own, *(task.metadata.name for task in TASK_LIST)]
        raise InputError(
            f"mteb has no task {name!r}{did_you_mean(name, known)}; list them with `mteb available-tasks`"
        ) from error


def label(model: str) -> str:
    """The name `OWNER/NAME` under which mteb keeps results of a checkpoint: a hub id as it is, a folder as `local/FOLDER`."""
    model = plain_name(model)
    if is_hub_id(model) and not Path(model).is_dir():
        return model
    return f"local/{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(model).resolve().name)}"


def needs(task: AbsTask) -> set[str]:
    """What the inputs of a task are, each as one input: `text`, `image`, `image,text`, or what no encoder of ours reads."""
    about = task.metadata
    if task.is_aggregate:
        return set().union(*(needs(part) for part in about.tasks))
    if isinstance(task, AbsTaskRetrieval):
        return {",".join(sorted(about.get_modalities(side))) for side in PromptType}
    columns = getattr(task, "input_column_name", "")
    return set(about.modalities) if isinstance(columns, str) else {",".join(sorted(columns))}


def lacks(task: AbsTask, modalities: Sequence[Modality]) -> str:
    """Why a model of these modalities cannot do a task; "" where it can."""
    missing = sorted(needs(task) - set(modalities))
    return f"it has inputs of {' and '.join(missing)}, and the model reads {' and '.join(modalities)}" if missing else ""


@dataclass(frozen=True, slots=True)
class Run:
    """One model over tasks into one folder. `online` False says that the hub does not answer, which explains failures."""

    model: TraceEncoder
    out: Path
    batch_size: int = 64
    online: bool = True
    progress: bool = False

    def outcomes(self, tasks: Sequence[AbsTask]) -> Iterator[Outcome]:
        """What becomes of each task, as it becomes of it; no failure of one stops the others."""
        register(self.model.mteb_model_meta)
        for task in tasks:
            yield self._outcome(task)

    def place(self, task: AbsTask) -> str:
        """What is to be expected of a task: `scored` already, `here`, `to fetch`, `out of reach`, or skipped and why."""
        if reason := lacks(task, modalities_of(self.model.encoder)):
            return f"skipped: {reason}"
        if self._kept(task) is not None:
            return "scored"
        if all(_is_here(part) for part in (task.metadata.tasks if task.is_aggregate else [task])):
            return "here"
        return "to fetch" if self.online else "out of reach"

    def _outcome(self, task: AbsTask) -> Outcome:
        about = task.metadata
        described = (about.name, about.type, about.main_score)
        if reason := lacks(task, modalities_of(self.model.encoder)):
            return Outcome(*described, "skipped", reason=reason)
        if kept := self._kept(task):
            return _with_score(Outcome(*described, "kept"), kept)
        parts = [self._outcome(part) for part in about.tasks] if task.is_aggregate else []
        if lost := [part for part in parts if part.score is None]:
            return Outcome(*described, "failed", reason=lost[0].reason if len(parts) == len(lost) else _some(lost, len(parts)))
        options = {"batch_size": self.batch_size, "show_progress_bar": self.progress}
        try:
            found = mteb.evaluate(
                self.model, task, cache=Results(self.out), overwrite_strategy="only-missing", encode_kwargs=options,
                co2_tracker=False, public_only=False, show_progress_bar=False,
            )  # fmt: skip
            return _with_score(Outcome(*described, "scored"), found.task_results[0])
        except Exception as error:  # the loaders and scorers of hundreds of tasks may raise anything; the other tasks go on
            log.info("%s failed", about.name, exc_info=True)
            return Outcome(*described, "failed", reason=self._why(error))

    def _kept(self, task: AbsTask) -> TaskResult | None:
        if not self.out.is_dir():
            return None
        found = Results(self.out).load_task_result(task.metadata.name, self.model.mteb_model_meta)
        return found if found is not None and not found.get_missing_evaluations(task) else None

    def _why(self, error: Exception) -> str:
        package = type(error).__module__.partition(".")[0]
        if not self.online and (isinstance(error, ConnectionError) or package in ("datasets", "huggingface_hub")):
            return _NO_HUB
        return f"{type(error).__name__}: {_words(error)}"


def _with_score(outcome: Outcome, result: TaskResult) -> Outcome:
    value = float(result.get_score())
    if not isfinite(value):
        return replace(outcome, state="failed", reason=f"mteb's score is {value}: nothing to compare, or vectors all alike")
    return replace(outcome, score=value, seconds=result.evaluation_time)


def _some(lost: Sequence[Outcome], count: int) -> str:
    return f"{len(lost)} of its {count} parts have no score, the first {lost[0].task}: {lost[0].reason}"


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _is_here(task: AbsTask) -> bool:
    """Whether the data of a task are on this machine, as far as can be told: loaded, made by its own code, a folder, cached."""
    path = str(task.metadata.dataset["path"])
    if task.data_loaded or not type(task).__module__.startswith(_MTEBS_TASKS) or Path(path).is_dir():
        return True
    cached = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "snapshots"
    return cached.is_dir() or (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir()


def means(outcomes: Sequence[Outcome]) -> dict[str, float]:
    """The mean over the tasks that have a score, and over the means of their types, as mteb's leaderboards rank."""
    by_type: dict[str, list[float]] = {}
    for one in outcomes:
        if one.score is not None:
            by_type.setdefault(one.type, []).append(one.score)
    if not by_type:
        return {}
    return {"tasks": fmean(chain.from_iterable(by_type.values())), "types": fmean(map(fmean, by_type.values()))}


def table(outcomes: Sequence[Outcome]) -> str:
    """The outcomes as Markdown: a row for each score, the means, and what has none, by reason."""
    scored = [one for one in outcomes if one.score is not None]
    lines = ["| task | type | metric | score | seconds |", "|---|---|---|---:|---:|"]
    for one in scored:
        before = ", before" if one.state == "kept" else ""
        seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
        lines.append(f"| {one.task} | {one.type} | {one.metric} | {100 * (one.score or 0.0):.2f} | {seconds}{before} |")
    for over, mean in means(outcomes).items():
        lines.append(f"| **mean over {over}** ({len(scored)} of {len(outcomes)} scored) | | | **{100 * mean:.2f}** | |")
    told = [f"- {md.escape(why)}: {', '.join(names)}" for why, names in reasons(outcomes).items()]
    return "\n".join([*(lines if scored else []), *([""] if scored and told else []), *told])


def reasons(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """The tasks without a score, by how many there are of them and why."""
    found: dict[tuple[State, str], list[str]] = {}
    for one in outcomes:
        if one.score is None:
            found.setdefault((one.state, one.reason), []).append(one.task)
    return {f"{len(names)} {state}: {why}": names for (state, why), names in found.items()}


def write(run: Run, outcomes: Sequence[Outcome], benchmarks: Sequence[str]) -> Path:
    """`results.json` and `results.md` in the folder of the run, each whole or not at all; the path of the former."""
    meta, encoder = run.model.mteb_model_meta, run.model.encoder
    head = {
        "format": FORMAT, "model": meta.name, "fingerprint": encoder.fingerprint, "prompt_version": encoder.prompt_version,
        "revision": meta.revision, "route": run.model.route, "benchmarks": list(benchmarks), "mteb": version("mteb"),
        "means": means(outcomes),
    }  # fmt: skip
    text = json.dumps({**head, "tasks": [asdict(one) for one in outcomes]}, indent=1) + "\n"
    title = f"# {md.line(meta.name)} under mteb {version('mteb')}, route {run.model.route}\n\n"
    _replace(run.out / "results.md", f"{title}{table(outcomes)}\n")
    return _replace(run.out / "results.json", text)


def _replace(path: Path, text: str) -> Path:
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    fresh.write_text(text, encoding="utf-8")
    os.replace(fresh, path)
    return path


def plan(run: Run, tasks: Sequence[AbsTask]) -> list[str]:
    """A line for each task: its name, type, what its inputs are, and what to expect of it; then the counts."""
    places = [run.place(task) for task in tasks]
    lines = [
        f"{task.metadata.name:32}  {task.metadata.type:28}  {' + '.join(sorted(needs(task))):18}  {place}"
        for task, place in zip(tasks, places, strict=True)
    ]
    counts = Counter(place.partition(":")[0] for place in places)
    return [*lines, f"{len(tasks)} tasks: {', '.join(f'{count} {place}' for place, count in counts.items())}"]


def score(
    run: Run, tasks: Sequence[AbsTask], *, benchmarks: Sequence[str] = (), tell: Callable[[str], None] = lambda line: None
) -> list[Outcome]:
    """Runs the tasks, says a line for each, writes the results after each. DataError where none of them has a score."""
    try:
        run.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {run.out} cannot be made a folder ({error}); choose another") from error
    outcomes: list[Outcome] = []
    for number, one in enumerate(run.outcomes(tasks), start=1):
        outcomes.append(one)
        write(run, outcomes, benchmarks)
        if line := _line(one):
            tell(f"{number}/{len(tasks)}  {one.task}  {line}")
    if all(one.score is None for one in outcomes):
        raise DataError(f"none of {len(tasks)} tasks has a score, see {run.out / 'results.md'}; {'; '.join(reasons(outcomes))}")
    return outcomes


def _line(one: Outcome) -> str:
    """What is said of an outcome at once; what many tasks share is left to the table."""
    if one.score is None:
        return "" if one.state == "skipped" or one.reason == _NO_HUB else f"failed: {one.reason}"
    return f"{one.metric} {100 * one.score:.2f}  {'scored before' if one.state == 'kept' else f'{one.seconds or 0.0:.1f} s'}"
