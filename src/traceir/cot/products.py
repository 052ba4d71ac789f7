"""What a build gives: M-BEIR-CoT, that is direct samples and kept reasoning in the order of the data, with tags stripped and
provenance kept; its data card and upload to the hub; and the quality report.

The report is `quality.json`, and the same as `quality.md` and as one HTML page that opens anywhere; its policy forbids scripts
and outside addresses. The card says what the folder, its build and its report say, and nothing else; by its front matter
`datasets.load_dataset(FOLDER)` reads the folder as it is: https://huggingface.co/docs/datasets/repository_structure.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Final, Literal

from huggingface_hub import DatasetCardData
from markupsafe import Markup
from tqdm import tqdm

from traceir.cot.ask import CUT
from traceir.cot.build import MORE_ROOM, reason_kind, summarise
from traceir.cot.files import read_document, read_object, write_json, write_text
from traceir.cot.outcomes import CotOutcome, read_outcomes
from traceir.cot.plan import CONFIG_FILE, DATASET, gather_captions, read_build, read_config
from traceir.cot.quality.quality import FILE, Quality, measure, read_quality, save_quality
from traceir.cot.quality.samples import BINS, FUNNEL
from traceir.cot.quality.texts import GROUPS
from traceir.cot.review.decisions import read_decisions
from traceir.cot.review.review import Settled, settle
from traceir.cot.rules import RULES
from traceir.cot.source import CaseSource, read_captions
from traceir.data import hub, mbeir
from traceir.data.cot import FORMAT as COT_FORMAT
from traceir.data.cot import NAME, to_row, write_rows
from traceir.data.report import code, line, number, percent, render
from traceir.data.samples import join
from traceir.errors import DataError, InputError

Dropped = Literal["leave_out", "direct"]
REASONS: Final = 100
MARK: Final = "<!-- Written by `traceir reasoning`, which replaces it. Remove this line to keep what you change. -->"
QUALITY: Final = "quality"
"""Folder of the report within a build."""
SIZES: Final = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
CANDIDATE: Final = ("did", "txt", "img_path", "modality")
COLUMNS: Final[Mapping[str, tuple[str, str]]] = tomllib.loads(
    (Path(__file__).parent / "data_card.toml").read_text(encoding="utf-8")
)
"""Type and meaning of each column."""
PlotRow = tuple[str, list[float]]
"""A label, and a value for each part of its bar."""


@dataclass(slots=True)
class Funnel:
    """What became of the queries of one task, and of all: counts by status and, of the dropped, by rule."""

    tasks: dict[str, Counter[str]] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)
    """Why replies of the teacher could not be used at all: the first REASONS kinds."""

    @property
    def total(self) -> Counter[str]:
        return Counter(dict(sorted(sum(self.tasks.values(), Counter[str]()).items())))

    def count(self, task: str, *names: str) -> None:
        self.tasks.setdefault(task, Counter()).update(names)

    def as_json(self) -> dict[str, Any]:
        return {"all": dict(self.total), "tasks": {name: dict(sorted(counts.items())) for name, counts in self.tasks.items()}}

    def problem(self) -> str:
        """Why nothing was made that is worth training on, or "": all queries, or all that are complex, were dropped."""
        total = self.total
        if total["kept"] or (total["direct"] and not total["complex"]):
            return ""
        rules = Counter(
            {f"rule {name[5:]}": n for name, n in total.items() if name.startswith("rule:") and name[5:] != "teacher"}
        )
        all_dropped = f"all {total['queries']} queries were dropped"
        what = f"none of {total['complex']} complex queries was kept" if total["direct"] else all_dropped
        reasons = summarise(rules + self.unread)
        return f"{what}: {reasons}" + (f"; {MORE_ROOM}" if CUT in reasons else "")

    def table(self) -> str:
        """The funnel as text: a line for each task."""
        lines = [f"{'task':<20}{'queries':>9}{'direct':>9}{'complex':>9}{'kept':>9}{'share':>8}  dropped by"]
        for name, counts in {**self.tasks, "all": self.total}.items():
            rules = ", ".join(f"{rule[5:]} {n}" for rule, n in counts.most_common() if rule.startswith("rule:"))
            share = f"{counts['kept'] / counts['complex']:.1%}" if counts["complex"] else ""
            numbers = "".join(f"{counts[column]:>9}" for column in ("queries", "direct", "complex", "kept"))
            lines.append(f"{name:<20}{numbers}{share:>8}  {rules}".rstrip())
        return "\n".join(lines)


def assemble(
    out: Path, *, format: str = "parquet", dropped: Dropped = "leave_out", negatives: bool = True, rows_per_file: int = 50_000
) -> Funnel:
    """Writes `OUT/dataset` (M-BEIR-CoT, docs/formats.md) and `OUT/funnel.json`; replaces what an earlier call wrote.

    Decisions of reviewers are applied (review.settle). What was dropped is left out, or trained as a direct query where
    `dropped` is "direct". Raises DataError where a part is not finished, and, once the funnel is written, where nothing is left.
    """
    if dropped not in ("leave_out", "direct"):
        raise InputError(f"dropped is {dropped!r}; choose leave_out or direct")
    config, funnel, settled = read_config(out), Funnel(), settle(out)
    root, target = Path(config.data), out / DATASET
    fresh, old = target.with_suffix(".new"), target.with_suffix(".old")
    shutil.rmtree(fresh, ignore_errors=True)
    with closing(CaseSource(root, config.tasks)) as source:
        rows = _rows(read_outcomes(out, source=source), source.pool, settled, dropped, negatives, funnel)
        first = next(rows, None)
        if first is None:
            write_json(out / "funnel.json", funnel.as_json())
            raise DataError(f"{out}: there is nothing to assemble, {funnel.problem() or 'its data have no query'}")
        write_rows(chain((first,), rows), root, fresh, format=format, rows_per_file=rows_per_file)
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(fresh, target)
    shutil.rmtree(old, ignore_errors=True)
    write_json(out / "funnel.json", funnel.as_json())
    return funnel


def _rows(
    outcomes: Iterator[CotOutcome],
    pool: Mapping[str, mbeir.Candidate],
    settled: Mapping[str, Settled],
    dropped: Dropped,
    negatives: bool,
    funnel: Funnel,
) -> Iterator[dict[str, Any]]:
    for outcome in outcomes:
        record, task = outcome.case.record, outcome.case.task
        decision = settled.get(record.qid)
        status, label = _decided(outcome, decision)
        funnel.count(task, "queries", status, *(["complex"] if outcome.z else []))
        if status == "dropped":
            funnel.count(task, f"rule:{'reviewer' if decision else outcome.rule}")
            if outcome.rule == "teacher" and not decision:
                kind = reason_kind(outcome.detail)
                funnel.unread[kind if kind in funnel.unread or len(funnel.unread) < REASONS else "another reason"] += 1
            if dropped == "leave_out":
                continue
        reviewed = {"reviewers": list(decision.reviewers), "edited": decision.edited} if decision else {}
        sample = join(record, label, pool, "the train pool", negatives=negatives)
        yield to_row(sample, task.rpartition("_task")[0], json.loads(outcome.provenance) | reviewed)


def _decided(outcome: CotOutcome, decision: Settled | None) -> tuple[str, mbeir.Label]:
    """Status and label after the decisions of reviewers."""
    status: str = outcome.status
    reasoning, answer = outcome.reasoning, outcome.answer
    if decision is not None and status != "direct":
        status = "dropped" if decision.decision == "drop" else "kept"
        reasoning, answer = decision.reasoning or reasoning, decision.answer or answer
    if status == "kept" and reasoning:
        return status, mbeir.Label(outcome.case.record.qid, 0, 1, reasoning, answer or None)
    return ("dropped" if status == "kept" else status), mbeir.Label(outcome.case.record.qid, 0, 0, None, None)


def write_quality(out: Path, to: Path) -> str:
    """Measures a build into `to`: `quality.json`, `quality.html`, `quality.md`; returns the text of the last.

    The data card beside the assembled files, where there are any, is written anew. Raises DataError where a part is not finished.
    """
    config = read_config(out)
    captions, decisions = read_captions(gather_captions(out, config)), read_decisions(out)
    outcomes, tokenizer = read_outcomes(out), config.limits.tokenizer
    quality = measure(outcomes, decisions=decisions, settled=settle(out), captions=captions, tokenizer=tokenizer)
    to.mkdir(parents=True, exist_ok=True)
    save_quality(to / FILE, quality)
    text = summary(quality)
    write_text(to / "quality.md", text)
    write_text(to / "quality.html", page(quality))
    if (out / DATASET / "manifest.json").is_file():
        write_cot_card(out / DATASET, out, quality=quality)
    return text


def summary(quality: Quality) -> str:
    """The figures in short, as Markdown without any text of the data but task names."""
    return _render("cot/quality.md.j2", quality)


def page(quality: Quality) -> str:
    """The whole page as text; equal figures give equal pages."""
    dropped_by = {rule: count for rule, count in quality.overall.rules.items() if count}
    plots = {
        "kept": [
            (task, [100 * own.funnel[stage] / max(own.funnel["complex"], 1) for stage in FUNNEL[1:]])
            for task, own in quality.tasks.items()
        ],
        "drops": [(rule, [own.rules[rule] for own in quality.tasks.values()]) for rule in dropped_by],
        "confidence": [
            (f"{step / BINS:.2f}", [quality.overall.confidence[word][step] for word in ("yes", "no")]) for step in range(BINS)
        ],
        "groups": list(_groups(quality)),
        **{name: list(_lengths(quality, name)) for name in ("reasoning_words", "answer_words")},
    }
    stages = [name.replace("_", " ") for name in FUNNEL]
    return _render("cot/quality.html.j2", quality, plots=plots, dropped_by=dropped_by, stages=stages)


def _render(template: str, quality: Quality, **more: object) -> str:
    return render(
        template,
        dataset=NAME,
        quality=quality,
        all=quality.overall,
        named=[*quality.tasks.items(), ("all", quality.overall)],
        hallucination=_in_words(quality.hallucination),
        fault=_in_words(quality.fault),
        **more,
    )


def _lengths(quality: Quality, measure_name: str) -> Iterator[PlotRow]:
    for first, last, count in quality.overall.lengths[measure_name]["histogram"]:
        yield f"{first}–{last}" if first < last else str(first), [count]


def _groups(quality: Quality) -> Iterator[PlotRow]:
    """Samples of each group of terms, in percent of those whose target has words, and of the others."""
    people: list[dict[str, Any]] = [quality.overall.people[kind] for kind in ("told", "untold")]
    for group in GROUPS if any(kind["groups"] for kind in people) else ():
        counts = ((kind["groups"].get(group, {"samples": 0})["samples"], max(kind["samples"], 1)) for kind in people)
        yield group, [100 * count / total for count, total in counts]


def _in_words(estimate: Mapping[str, Any]) -> Markup:
    """An estimate of quality.estimate_share as part of a sentence."""
    if estimate["share"] is None:
        return Markup("not reviewed")
    share, low, high, covered = (estimate[name] for name in ("share", "low", "high", "covered"))
    reach = "" if covered >= 0.99995 else f"; the reviewed tasks hold {percent(covered)} of the kept samples"
    return Markup(
        f"{percent(share)} of kept samples (95 % interval {percent(low)} to {percent(high)}; "
        f"{estimate['wrong']} of {estimate['reviewed']} reviewed at random{reach})"
    )


def write_cot_card(folder: Path, out: Path | None = None, *, quality: Quality | None = None, licence: str | None = None) -> str:
    """Writes README.md beside the files of an M-BEIR-CoT and returns its text.

    `out` is the folder of the build that made them; `quality` its figures, by default those of `OUT/quality/quality.json`, which
    are left out if they are of another state. `licence` is an identifier of the hub such as cc-by-4.0. A card written by hand is
    kept as it is. Raises DataError for a folder that is not whole.
    """
    readme = folder / "README.md"
    if readme.is_file() and MARK not in (text := readme.read_text(encoding="utf-8")):
        return text
    manifest = _read_manifest(folder)
    build = read_build(out) if out is not None and (out / CONFIG_FILE).is_file() else {}
    teacher = _model(build.get("model"))
    about = read_object(Path(str(build["data"])) / "meta.json") if build.get("data") else {}
    source = line(about.get("name") or "data in M-BEIR's layout")
    complex_ = sum(int(task["complex"]) for task in manifest["tasks"].values())
    if quality is None and out is not None and (out / QUALITY / FILE).is_file():
        quality = read_quality(out / QUALITY / FILE)
    if quality is not None and quality.overall.funnel["curated"] != complex_:
        quality = None  # of another state of the data
    funnel = read_object(out / "funnel.json").get("all", {}) if out is not None else {}
    text = render(
        "cot/data_card.md.j2",
        front_matter=Markup(_front_matter(manifest, f"{NAME}, {source}" + (f", by {teacher}" if teacher else ""), licence)),
        mark=Markup(MARK),
        dataset=NAME,
        source=source,
        samples=int(manifest["samples"]),
        complex=complex_,
        build=build,
        teacher=teacher,
        verifier=_model(build.get("verifier")) or teacher,
        rules=Markup(", ".join(RULES)),
        unasked=_unasked(build),
        funnel=list(_funnel_rows(funnel)) if funnel else [],
        tasks=[
            [name, *(number(row[key]) for key in ("samples", "complex", "negatives"))] for name, row in manifest["tasks"].items()
        ],
        columns=[[Markup(f"`{name}`"), kind, Markup(meaning)] for name, (kind, meaning) in COLUMNS.items()],
        quality=quality,
        hallucination=_in_words(quality.hallucination) if quality else "",
        fault=_in_words(quality.fault) if quality else "",
    )
    write_text(readme, text)
    return text


def push_cot(folder: Path, repo: str, *, dry_run: bool = True, private: bool = True, revision: str | None = None) -> str:
    """Uploads an assembled M-BEIR-CoT with its card to the hub and returns the address of the commit.

    Card, manifest and the files it names go, nothing else. With `dry_run` it only checks, needs no network, and returns what
    would be uploaded. The token is the one that `hf auth login` or HF_TOKEN has set; it is never read here. Raises DataError for
    a folder that is not whole, InputError for a bad name, TraceError where the hub refuses or cannot be reached; then push again.
    """
    hub.check_name(repo)
    return hub.upload(folder, pushed_files(folder), repo, "dataset", private=private, dry_run=dry_run, revision=revision)


def pushed_files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes of what is uploaded, each checked against the manifest's hashes. Raises DataError."""
    manifest = _read_manifest(folder)
    if not (folder / "README.md").is_file():
        raise DataError(f"{folder} has no README.md, which tells the hub how to read it; run `traceir reasoning assemble`")
    for entry in tqdm(manifest["files"], desc="checking files", unit="file", delay=2.0):
        path = folder / entry["name"]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != entry["sha256"]:
            raise DataError(f"{path} is not the file that the manifest names; run `traceir reasoning assemble` again")
    names = ["README.md", "manifest.json", *(entry["name"] for entry in manifest["files"])]
    return [(name, (folder / name).stat().st_size) for name in names]


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / "manifest.json"
    if not file.is_file():
        raise DataError(f"{file} is not there; assemble the data to its end first")
    manifest = read_document(file, NAME, COT_FORMAT, "", "write the folder again with this release")
    for name in (entry["name"] for entry in manifest["files"]):
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing, but named by the manifest; copy or write it again")
    return manifest


def _front_matter(manifest: Mapping[str, Any], name: str, licence: str | None) -> str:
    samples, suffix = int(manifest["samples"]), Path(str(manifest["files"][0]["name"])).suffix
    card = DatasetCardData(
        pretty_name=name,
        language="en",
        license=licence,
        size_categories=next((word for most, word in SIZES if samples < most), "10M<n<100M"),
        task_categories=["feature-extraction", "text-retrieval"],
        tags=["traceir", "multimodal-retrieval", "reasoning", "chain-of-thought", "synthetic"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": f"train-*{suffix}"}]}],
        dataset_info={"features": [_feature(name, kind) for name, (kind, _) in COLUMNS.items()]},
    )
    return f"{card.to_yaml()}\n"


def _feature(name: str, kind: str) -> dict[str, Any]:
    """A column as the front matter has it; equal parts are never the same object, which YAML would write as a reference."""
    lists = {"list of strings": "string", "list of candidates": [{"name": field, "dtype": "string"} for field in CANDIDATE]}
    return {"name": name} | ({"list": lists[kind]} if kind in lists else {"dtype": kind})


def _unasked(build: Mapping[str, Any]) -> Markup:
    """Which tasks the settings decided."""
    names = ((z, ", ".join(f"`{code(name)}`" for name in build.get(kind) or ())) for kind, z in (("direct", 0), ("complex", 1)))
    return Markup("; ".join(f"{shown} (z = {z})" for z, shown in names if shown))


def _funnel_rows(funnel: Mapping[str, int]) -> Iterator[tuple[object, str]]:
    rows = (("queries", "queries"), ("direct", "direct"), ("complex, kept", "kept"), ("complex, dropped", "dropped"))
    yield from ((words, number(funnel.get(name, 0))) for words, name in rows)
    dropped = {name.removeprefix("rule:"): count for name, count in funnel.items() if name.startswith("rule:")}
    for rule in sorted(dropped, key=lambda rule: -dropped[rule]):
        yield Markup(f"dropped by `{code(rule)}`"), number(dropped[rule])


def _model(name: object) -> str:
    """The name a teacher is served by; of a path its last part: a card does not show where files lie."""
    text = line(name or "")
    return Path(text).name if text.startswith(("/", "~", ".")) else text
