"""The data card of an assembled M-BEIR-CoT, and its upload to the Hugging Face hub.

The card says what the folder, its build and its quality report say, and nothing else; text that comes from data or models is
escaped. Its front matter names the data files and their columns, so that `datasets.load_dataset(FOLDER)` reads the folder as it
is: https://huggingface.co/docs/datasets/repository_structure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from huggingface_hub import DatasetCardData
from tqdm import tqdm

from traceir.cot.files import write_text
from traceir.cot.plan import CONFIG_FILE, read_build
from traceir.cot.quality.quality import FILE, Quality, percent, read_quality, told_estimate
from traceir.cot.rules import RULES
from traceir.data import hub
from traceir.data import markdown as md
from traceir.data.cot import FORMAT as COT_FORMAT
from traceir.data.cot import NAME
from traceir.errors import DataError

MARK: Final = "<!-- Written by `traceir reasoning`, which replaces it. Remove this line to keep what you change. -->"
QUALITY: Final = "quality"
"""Folder of the report within a build."""
SIZES: Final = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
CANDIDATES: Final = [{"name": name, "dtype": "string"} for name in ("did", "txt", "img_path", "modality")]
COLUMNS: Final[tuple[tuple[str, Any, str], ...]] = (
    ("qid", "string", "`DATASET_ID:INDEX`"),
    ("task", "string", "data set and task id, such as `cirr_task7`"),
    ("task_id", "int32", "M-BEIR's task, 0 to 8"),
    ("dataset_id", "int32", "M-BEIR's number of the data set"),
    ("query_txt", "string", "text of the query, or null"),
    ("query_img_path", "string", "picture of the query, or null; a path below the data folder"),
    ("query_modality", "string", "`text`, `image` or `image,text`"),
    ("cand_modality", "string", "the same of the candidates"),
    ("z", "int32", "1: complex, with reasoning; 0: direct"),
    ("reasoning", "string", "the teacher's reasoning, null where z is 0"),
    ("answer", "string", "its description of the target, null where z is 0"),
    ("steps", "int32", "dependent steps, 0 where nobody counted them; null without a label"),
    ("pos_cand_list", ["string"], "ids of all positives"),
    ("positives", CANDIDATES, "those in the train pool: `did`, `txt`, `img_path`, `modality`"),
    ("negatives", CANDIDATES, "hard negatives, may be empty"),
    ("provenance", "string", "JSON: teacher, verifier, prompt version, seed, keys of the answers, tokens, reviewers"),
)
"""Name, type and meaning of each column (docs/formats.md, section 17)."""
"""What a request may raise; the HTTP library below huggingface_hub changes with its releases."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a card is made of; `build`, `funnel` and `quality` are empty or None where there are none."""

    manifest: Mapping[str, Any]
    build: Mapping[str, Any]
    funnel: Mapping[str, int]
    quality: Quality | None
    source: str

    @property
    def teacher(self) -> str:
        return _model(self.build.get("model"))

    @property
    def verifier(self) -> str:
        return _model(self.build.get("verifier")) or self.teacher


def write_cot_card(folder: Path, out: Path | None = None, *, quality: Quality | None = None, licence: str | None = None) -> str:
    """Writes README.md beside the files of an M-BEIR-CoT and returns its text.

    `out` is the folder of the build that made them; `quality` its figures, by default those of `OUT/quality/quality.json`, which
    are left out if they are of another state. `licence` is an identifier of the hub such as cc-by-4.0. A card written by hand is
    kept as it is. Raises DataError for a folder that is not whole.
    """
    readme = folder / "README.md"
    if readme.is_file() and MARK not in (text := readme.read_text(encoding="utf-8")):
        return text
    facts = _facts(folder, out, quality)
    parts = (
        _opening(facts),
        _making(facts),
        _tasks(facts),
        _fields(),
        _loading(facts),
        _images(facts),
        _limits(facts),
        _cost(facts),
    )
    text = f"---\n{_front_matter(facts, licence)}---\n\n{MARK}\n\n" + "\n".join(parts)
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
    for one in tqdm(manifest["files"], desc="checking files", unit="file", delay=2.0):
        path = folder / one["name"]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if digest != one["sha256"]:
            raise DataError(f"{path} is not the file that the manifest names; run `traceir reasoning assemble` again")
    names = ["README.md", "manifest.json", *(one["name"] for one in manifest["files"])]
    return [(name, (folder / name).stat().st_size) for name in names]


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / "manifest.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); assemble the data to its end first") from error
    if not isinstance(found, dict) or found.get("name") != NAME or found.get("format") != COT_FORMAT:
        raise DataError(f"{file}: not a manifest of {NAME}, format {COT_FORMAT}; write the folder again with this release")
    missing = [
        one["name"] for one in found["files"] if Path(one["name"]).name != one["name"] or not (folder / one["name"]).is_file()
    ]
    if missing:
        raise DataError(f"{folder / missing[0]} is missing, but named by the manifest; copy or write it again")
    return found


# The card


def _facts(folder: Path, out: Path | None, quality: Quality | None) -> _Facts:
    manifest = _read_manifest(folder)
    build = read_build(out) if out is not None and (out / CONFIG_FILE).is_file() else {}
    if quality is None and out is not None and (out / QUALITY / FILE).is_file():
        quality = read_quality(out / QUALITY / FILE)
    reasoned = sum(int(one["complex"]) for one in manifest["tasks"].values())
    if quality is not None and quality.overall.funnel["curated"] != reasoned:
        quality = None  # of another state of the data
    funnel = _read_json(out / "funnel.json").get("all", {}) if out is not None else {}
    about = _read_json(Path(str(build["data"])) / "meta.json") if build.get("data") else {}
    return _Facts(manifest, build, funnel, quality, md.line(about.get("name") or "data in M-BEIR's layout"))


def _read_json(file: Path) -> dict[str, Any]:
    """{} where the file is not there."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON ({error}); make it again") from error
    return found if isinstance(found, dict) else {}


def _front_matter(facts: _Facts, licence: str | None) -> str:
    samples = int(facts.manifest["samples"])
    name = f"{NAME}, {facts.source}" + (f", by {md.line(facts.teacher)}" if facts.teacher else "")
    card = DatasetCardData(
        pretty_name=name,
        language="en",
        license=licence,
        size_categories=next((word for most, word in SIZES if samples < most), "10M<n<100M"),
        task_categories=["feature-extraction", "text-retrieval"],
        tags=["traceir", "multimodal-retrieval", "reasoning", "chain-of-thought", "synthetic"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": f"train-*.{_suffix(facts)}"}]}],
        dataset_info={"features": [_column(column, kind) for column, kind, _ in COLUMNS]},
    )
    return f"{card.to_yaml()}\n"


def _column(name: str, kind: Any) -> dict[str, Any]:
    if isinstance(kind, str):
        return {"name": name, "dtype": kind}
    return {"name": name, "list": kind[0] if kind == ["string"] else [dict(one) for one in kind]}


def _suffix(facts: _Facts) -> str:
    return Path(str(facts.manifest["files"][0]["name"])).suffix.removeprefix(".")


def _opening(facts: _Facts) -> str:
    by = f" The reasoning was written by `{md.code(facts.teacher)}`." if facts.teacher else ""
    total, complex_ = int(facts.manifest["samples"]), sum(int(one["complex"]) for one in facts.manifest["tasks"].values())
    return (
        f"# {NAME}, {md.escape(facts.source)}\n\n"
        f"{total:,} training samples for multimodal retrieval that reasons when a query needs it: {complex_:,} complex queries "
        f"with reasoning and a description of the target, {total - complex_:,} direct ones without.{by}\n\n"
        "The recipe is that of TRACE ([arXiv 2603.02929](https://arxiv.org/abs/2603.02929), section 3), whose own data were not "
        "published. Texts are machine-made; see the limits below before training on them.\n"
    )


def _making(facts: _Facts) -> str:
    if not facts.build:
        return "## How it was made\n\nThe build was not given.\n"
    build = facts.build
    limits = build.get("limits", {})
    steps = [
        f"Complexity: the teacher `{md.code(facts.teacher)}` sorts queries into direct (z = 0) and complex (z = 1)."
        f"{_unasked(build)}",
        "Reasoning: for complex queries it writes `<reasoning>` and `<answer>`, by a prompt for each kind of task; it does not "
        "see the target.",
        f"Rules: {', '.join(RULES)}, in this order; the first one that is broken drops the sample. Reasoning has "
        f"{limits.get('reasoning_least')} to {limits.get('reasoning_most')} tokens, an answer {limits.get('answer_least')} to "
        f"{limits.get('answer_most')}.",
        f"Verifier: `{md.code(facts.verifier)}` sees query, answer and true target; kept is a yes with a "
        f"confidence above {build.get('verify_above')}.",
        "Review: decisions of people, where there are any, replace those of the filter.",
    ]
    told = [f"{number}. {step}" for number, step in enumerate(steps, 1)]
    told.append(
        f"\nPrompts `{md.code(build.get('prompts'))}`, seed {md.code(build.get('seed'))}, temperature "
        f"{md.code(build.get('temperature'))}, attempts at each question: at most {md.code(build.get('attempts'))}. "
        f"Fingerprint of the data: `{md.code(build.get('data_fingerprint') or 'none')}`.\n"
    )
    return "## How it was made\n\n" + "\n".join(told) + _funnel(facts)


def _unasked(build: Mapping[str, Any]) -> str:
    """Which tasks the settings decided."""
    named = [(z, [md.line(name) for name in build.get(kind) or ()]) for kind, z in (("direct", 0), ("complex", 1))]
    told = [f"{', '.join(f'`{md.code(name)}`' for name in names)} (z = {z})" for z, names in named if names]
    return f" Taken so by the settings, unasked: {'; '.join(told)}." if told else ""


def _funnel(facts: _Facts) -> str:
    if not facts.funnel:
        return ""
    rows = [("queries", "queries"), ("direct", "direct"), ("complex, kept", "kept"), ("complex, dropped", "dropped")]
    lines = [f"| {word} | {facts.funnel.get(name, 0):,} |" for word, name in rows]
    dropped = [(name[5:], count) for name, count in facts.funnel.items() if name.startswith("rule:")]
    lines += [f"| dropped by `{md.code(name)}` | {count:,} |" for name, count in sorted(dropped, key=lambda one: -one[1])]
    return "\n| | queries |\n|---|---:|\n" + "\n".join(lines) + "\n"


def _tasks(facts: _Facts) -> str:
    lines = [
        f"| {md.escape(name)} | {one['samples']:,} | {one['complex']:,} | {one['negatives']:,} |"
        for name, one in facts.manifest["tasks"].items()
    ]
    return "## Tasks\n\n| task | samples | with reasoning | hard negatives |\n|---|---:|---:|---:|\n" + "\n".join(lines) + "\n"


def _fields() -> str:
    lines = [f"| `{name}` | {_kind(kind)} | {meaning} |" for name, kind, meaning in COLUMNS]
    return "## Fields\n\n| column | type | meaning |\n|---|---|---|\n" + "\n".join(lines) + "\n"


def _kind(kind: Any) -> str:
    return kind if isinstance(kind, str) else "list of strings" if kind == ["string"] else "list of candidates"


def _loading(facts: _Facts) -> str:
    return (
        "## Use\n\n```python\nfrom datasets import load_dataset\n\n"
        'samples = load_dataset("FOLDER", split="train")  # this folder, or its name on the hub\n```\n\n'
        "`traceir train --preset NAME --data FOLDER` trains on it. For pictures and instructions, `root` in `manifest.json` "
        "names the data folder relative to this one; change it where that folder lies elsewhere.\n"
    )


def _images(facts: _Facts) -> str:
    return (
        "## Pictures and licences\n\n"
        f"Pictures are not included. Queries, candidates and pictures come from {md.escape(facts.source)}; their terms hold "
        "for what is repeated here. M-BEIR's are on its page, "
        "[TIGER-Lab/M-BEIR](https://huggingface.co/datasets/TIGER-Lab/M-BEIR), data set by data set. Those of the teacher's "
        "maker may limit what its texts may be used for.\n"
    )


def _limits(facts: _Facts) -> str:
    lines = [
        "- Reasoning may be wrong although rules and verifier let it pass; the verifier is a model too.",
        "- The reasoning is English, in the manner of one teacher.",
        "- The teacher may describe people in terms that nothing in the data supports.",
    ]
    return (
        "## Limits and biases\n\n" + "\n".join([*lines, *(_measured(facts.quality) if facts.quality else [_UNMEASURED])]) + "\n"
    )


_UNMEASURED: Final = (
    "- Not measured yet: `traceir reasoning report` measures hallucination, repetition, terms about people and copying."
)


def _measured(quality: Quality) -> Iterator[str]:
    own = quality.overall
    yield f"- Hallucinated: {told_estimate(quality.hallucination)}."
    yield f"- Dropped for any reason, or edited, by reviewers: {told_estimate(quality.fault)}."
    exact, near = own.duplicates["exact"], own.duplicates["near"]
    yield (
        f"- Repetition: {percent(exact['share'])} of the reasonings repeat another word for word; {percent(near['share'])} of "
        f"{near['samples']:,} looked at are near duplicates; the ten most frequent openings begin "
        f"{percent(own.openings['share'])} of all."
    )
    for kind, word in (("told", "the target has words"), ("untold", "the target is a picture alone")):
        found = own.people[kind]
        if found["samples"]:
            groups = "; ".join(
                f"{group} {one['samples']:,} ({', '.join(term['term'] for term in one['terms'][:5])})"
                for group, one in found["groups"].items()
            )
            yield (
                f"- Terms about people that neither query nor target tells, where {word}: {percent(found['share'])} of "
                f"{found['samples']:,} samples{f'. {groups}' if groups else ''}."
            )
    if own.copied["samples"]:
        yield (
            f"- Copied from the target's text (8 words in a row, or a short text whole): {percent(own.copied['share'])} of "
            f"{own.copied['samples']:,} samples whose target has text."
        )


def _cost(facts: _Facts) -> str:
    if facts.quality is None:
        return "## Cost\n\nNot measured yet; the column `provenance` has the tokens of each sample.\n"
    cost = facts.quality.cost
    usd = f", {cost['usd']:,.2f} USD" if "usd" in cost else ""
    return (
        f"## Cost\n\n{cost['prompt_tokens']:,.0f} tokens read and {cost['completion_tokens']:,.0f} written{usd}, for the answers "
        "that stand; repeated attempts are not in it.\n"
    )


def _model(name: object) -> str:
    """The name a teacher is served by; of a path its last part: where somebody's files lie is nobody's business."""
    text = md.line(name or "")
    return Path(text).name if text.startswith(("/", "~", ".")) else text
