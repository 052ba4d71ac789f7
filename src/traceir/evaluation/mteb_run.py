"""An encoder through tasks and whole benchmarks of mteb: what can run is scored, kept and shown; what cannot is named.

`out` is a folder of results as mteb keeps them (`mteb.ResultCache(out)`), with our `results.json` and `results.md` beside them.
A task is scored once: whoever calls again, after any kill, goes on behind it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import re
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from mteb.get_tasks import _TASKS_REGISTRY
from mteb.results import TaskResult
from mteb.types import PromptType

from traceir.checkpoint import is_hub_id, plain_name
from traceir.data import report as md
from traceir.errors import DataError, InputError
from traceir.evaluation.mteb_model import TraceEncoder, modalities_of, register
from traceir.files import write_whole
from traceir.items import Modality
from traceir.suggest import did_you_mean

log = logging.getLogger(__name__)

FORMAT: Final = 1
State = Literal["scored", "kept", "skipped", "failed"]
"""`kept`: scored by an earlier call; `skipped`: it needs what the model does not read; `failed`: see the reason."""
_MTEBS_TASKS: Final = "mteb.tasks."
_NO_HUB: Final = "the data are not on this machine, and the hub does not answer"


@dataclass(frozen=True, slots=True)
class MtebOutcome:
    """What became of one task: its main score and seconds as mteb gives them, or the reason why there is none."""

    task: str
    type: str
    metric: str
    state: State
    score: float | None = None
    seconds: float | None = None
    reason: str = ""


class MtebResults(ResultCache):
    """mteb's folder of results, written so that a file is there whole or not at all; a broken one counts as none."""

    def load_task_result(self, task_name: str, *where: Any, **options: Any) -> TaskResult | None:
        try:
            return super().load_task_result(task_name, *where, **options)
        except (ValueError, KeyError) as error:  # json's and pydantic's errors are ValueErrors
            message = "the result of %s in %s cannot be read (%s); it is scored anew"
            log.warning(message, task_name, self.cache_path, _words(error))
            return None

    def save_to_cache(self, task_result: TaskResult, model_name: Any, *where: Any, **options: Any) -> None:
        """As mteb writes, elsewhere; then each file is moved here, the result last."""
        target = self.get_task_result_path(task_result.task_name, model_name, *where)
        with TemporaryDirectory() as scratch:
            elsewhere = ResultCache(scratch)
            fresh = elsewhere.get_task_result_path(task_result.task_name, model_name, *where)
            fresh.parent.mkdir(parents=True)
            settings = target.parent / "run_settings.jsonl"  # mteb merges into it
            if settings.is_file():
                shutil.copyfile(settings, fresh.parent / settings.name)
            elsewhere.save_to_cache(task_result, model_name, *where, **options)
            for file in sorted(fresh.parent.iterdir(), key=fresh.__eq__):
                write_whole(target.parent / file.name, file.read_text(encoding="utf-8"))


def choose_tasks(benchmarks: Sequence[str], names: Sequence[str], module: str | None = None) -> list[AbsTask]:
    """The tasks of mteb's benchmarks, those of these names, and those of a Python module or file, each once.

    With names, a module only adds to what a name may mean. InputError for what neither mteb nor the module has.
    """
    own = {task.metadata.name: task for task in (_tasks_of(_import(module)) if module else [])}
    tasks: list[AbsTask] = []
    for name in benchmarks:
        tasks += _get("benchmark", name, mteb.get_benchmark, lambda: [board.name for board in mteb.get_benchmarks()]).tasks
    tasks += [own.get(name) or _get("task", name, mteb.get_task, lambda: [*own, *_TASKS_REGISTRY]) for name in names]
    tasks += [] if names else own.values()
    return list({task.metadata.name: task for task in tasks}.values())


def _tasks_of(module: ModuleType) -> list[AbsTask]:
    """mteb tasks among the names of a module: instances as they are, classes made; not mteb's own, imported to build on."""
    tasks = []
    for value in vars(module).values():
        if isinstance(value, AbsTask):
            tasks.append(value)
        elif isinstance(value, type) and issubclass(value, AbsTask) and not value.__module__.startswith(_MTEBS_TASKS):
            tasks += [value()] if getattr(value, "metadata", None) is not None else []
    if not tasks:
        raise InputError(f"{module.__name__} defines no mteb task; it needs a subclass of an AbsTask class with metadata")
    return tasks


def _import(name: str) -> ModuleType:
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


def _get(kind: str, name: str, get: Callable[[str], Any], known: Callable[[], Iterable[str]]) -> Any:
    try:
        return get(name)
    except KeyError as error:
        hint = f"{did_you_mean(name, known())}; list them with `mteb available-{kind}s`"
        raise InputError(f"mteb has no {kind} {name!r}{hint}") from error


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
class MtebRun:
    """One model over tasks into one folder. `online` False says that the hub does not answer, which explains failures."""

    model: TraceEncoder
    out: Path
    batch_size: int = 64
    online: bool = True
    progress: bool = False

    def expected(self, task: AbsTask) -> str:
        """What is to be expected of a task: `scored` already, `here`, `to fetch`, `out of reach`, or skipped and why."""
        if reason := lacks(task, modalities_of(self.model.encoder)):
            return f"skipped: {reason}"
        if self._kept(task) is not None:
            return "scored"
        if all(_is_here(part) for part in (task.metadata.tasks if task.is_aggregate else [task])):
            return "here"
        return "to fetch" if self.online else "out of reach"

    def outcome(self, task: AbsTask) -> MtebOutcome:
        """What becomes of a task when it is run now; whatever goes wrong is its reason."""
        about = task.metadata
        failed = MtebOutcome(about.name, about.type, about.main_score, "failed")
        if reason := lacks(task, modalities_of(self.model.encoder)):
            return replace(failed, state="skipped", reason=reason)
        if kept := self._kept(task):
            return _with_score(replace(failed, state="kept"), kept)
        parts = [self.outcome(part) for part in about.tasks] if task.is_aggregate else []
        if lost := [part for part in parts if part.score is None]:
            first = f"{len(lost)} of its {len(parts)} parts have no score, the first {lost[0].task}: {lost[0].reason}"
            return replace(failed, reason=lost[0].reason if len(parts) == len(lost) else first)
        options = {"batch_size": self.batch_size, "show_progress_bar": self.progress}
        try:
            scored = mteb.evaluate(
                self.model, task, cache=MtebResults(self.out), overwrite_strategy="only-missing", encode_kwargs=options,
                co2_tracker=False, public_only=False, show_progress_bar=False,
            )  # fmt: skip
            return _with_score(replace(failed, state="scored"), scored.task_results[0])
        except Exception as error:  # the loaders and scorers of hundreds of tasks may raise anything; the other tasks go on
            log.info("%s failed", about.name, exc_info=True)
            package = type(error).__module__.partition(".")[0]
            from_hub = isinstance(error, ConnectionError) or package in ("datasets", "huggingface_hub")
            reason = _NO_HUB if from_hub and not self.online else f"{type(error).__name__}: {_words(error)}"
            return replace(failed, reason=reason)

    def _kept(self, task: AbsTask) -> TaskResult | None:
        if not self.out.is_dir():
            return None
        kept = MtebResults(self.out).load_task_result(task.metadata.name, self.model.mteb_model_meta)
        return kept if kept is not None and not kept.get_missing_evaluations(task) else None


def _with_score(outcome: MtebOutcome, result: TaskResult) -> MtebOutcome:
    value = float(result.get_score())
    if not isfinite(value):
        return replace(outcome, state="failed", reason=f"mteb's score is {value}: nothing to compare, or vectors all alike")
    return replace(outcome, score=value, seconds=result.evaluation_time)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _is_here(task: AbsTask) -> bool:
    """Whether the data of a task are on this machine, as far as can be told: loaded, made by its own code, a folder, cached."""
    path = str(task.metadata.dataset["path"])
    if task.data_loaded or not type(task).__module__.startswith(_MTEBS_TASKS) or Path(path).is_dir():
        return True
    cached = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"datasets--{path.replace('/', '--')}" / "snapshots"
    return cached.is_dir() or (Path(datasets.config.HF_DATASETS_CACHE) / path.replace("/", "___")).is_dir()


def means(outcomes: Sequence[MtebOutcome]) -> dict[str, float]:
    """The mean over the tasks that have a score, and over the means of their types, as mteb's leaderboards rank."""
    by_type: dict[str, list[float]] = {}
    for outcome in outcomes:
        if outcome.score is not None:
            by_type.setdefault(outcome.type, []).append(outcome.score)
    if not by_type:
        return {}
    return {"tasks": fmean(chain.from_iterable(by_type.values())), "types": fmean(map(fmean, by_type.values()))}


def table(outcomes: Sequence[MtebOutcome]) -> str:
    """The outcomes as Markdown: a row for each score, the means, and what has none, by reason."""
    rows: list[tuple[object, ...]] = []
    for outcome in outcomes:
        if outcome.score is not None:
            seconds = "" if outcome.seconds is None else f"{outcome.seconds:.1f}"
            before = ", before" if outcome.state == "kept" else ""
            rows.append((outcome.task, outcome.type, outcome.metric, f"{100 * outcome.score:.2f}", f"{seconds}{before}"))
    share = f"({len(rows)} of {len(outcomes)} scored)"
    rows += [(f"**mean over {over}** {share}", "", "", f"**{100 * mean:.2f}**", "") for over, mean in means(outcomes).items()]
    scored = [md.markdown_table(("task", "type", "metric", "score", "seconds"), "lllrr", rows)] if rows else []
    unscored = [f"- {md.escape(why)}: {', '.join(names)}" for why, names in _reasons(outcomes).items()]
    return "\n".join([*scored, *([""] if scored and unscored else []), *unscored])


def _reasons(outcomes: Sequence[MtebOutcome]) -> dict[str, list[str]]:
    """The tasks without a score, by how many there are of them and why."""
    groups: dict[tuple[State, str], list[str]] = {}
    for outcome in outcomes:
        if outcome.score is None:
            groups.setdefault((outcome.state, outcome.reason), []).append(outcome.task)
    return {f"{len(names)} {state}: {why}": names for (state, why), names in groups.items()}


def plan(run: MtebRun, tasks: Sequence[AbsTask]) -> list[str]:
    """A line for each task: its name, type, what its inputs are, and what to expect of it; then the counts."""
    states = [run.expected(task) for task in tasks]
    lines = [
        f"{task.metadata.name:32}  {task.metadata.type:28}  {' + '.join(sorted(needs(task))):18}  {state}"
        for task, state in zip(tasks, states, strict=True)
    ]
    counts = Counter(state.partition(":")[0] for state in states)
    return [*lines, f"{len(tasks)} tasks: {', '.join(f'{count} {state}' for state, count in counts.items())}"]


def score(
    run: MtebRun, tasks: Sequence[AbsTask], *, benchmarks: Sequence[str] = (), tell: Callable[[str], None] = lambda line: None
) -> list[MtebOutcome]:
    """Runs the tasks, says a line for each, writes the results after each. DataError where none of them has a score.

    What many tasks share, such as a modality that the model does not read, is left to the table.
    """
    try:
        run.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {run.out} cannot be made a folder ({error}); choose another") from error
    register(run.model.mteb_model_meta)
    outcomes: list[MtebOutcome] = []
    for number, task in enumerate(tasks, start=1):
        outcome = run.outcome(task)
        outcomes.append(outcome)
        _write(run, outcomes, benchmarks)
        if outcome.score is not None:
            took = "scored before" if outcome.state == "kept" else f"{outcome.seconds or 0.0:.1f} s"
            tell(f"{number}/{len(tasks)}  {outcome.task}  {outcome.metric} {100 * outcome.score:.2f}  {took}")
        elif outcome.state == "failed" and outcome.reason != _NO_HUB:
            tell(f"{number}/{len(tasks)}  {outcome.task}  failed: {outcome.reason}")
    if all(outcome.score is None for outcome in outcomes):
        raise DataError(f"none of {len(tasks)} tasks has a score, see {run.out / 'results.md'}; {'; '.join(_reasons(outcomes))}")
    return outcomes


def _write(run: MtebRun, outcomes: Sequence[MtebOutcome], benchmarks: Sequence[str]) -> None:
    """`results.json` and `results.md` in the folder of the run, each whole or not at all."""
    meta, encoder = run.model.mteb_model_meta, run.model.encoder
    results = {
        "format": FORMAT, "model": meta.name, "fingerprint": encoder.fingerprint, "prompt_version": encoder.prompt_version,
        "revision": meta.revision, "route": run.model.route, "benchmarks": list(benchmarks), "mteb": version("mteb"),
        "means": means(outcomes), "tasks": [asdict(outcome) for outcome in outcomes],
    }  # fmt: skip
    title = f"# {md.line(meta.name)} under mteb {version('mteb')}, route {run.model.route}\n\n"
    write_whole(run.out / "results.md", f"{title}{table(outcomes)}\n")
    write_whole(run.out / "results.json", json.dumps(results, indent=1) + "\n")
