"""The data card of an assembled M-BEIR-CoT (`data_card.md.j2`), and its upload to the Hugging Face hub.

The card says what the folder, its build and its quality report say, and nothing else. Its front matter names the data files and
their columns, so that `datasets.load_dataset(FOLDER)` reads the folder as it is:
https://huggingface.co/docs/datasets/repository_structure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from huggingface_hub import DatasetCardData
from markupsafe import Markup
from tqdm import tqdm

from traceir.cot.files import write_text
from traceir.cot.plan import CONFIG_FILE, read_build
from traceir.cot.quality.quality import FILE, Quality, estimate_in_words, read_quality
from traceir.cot.rules import RULES
from traceir.data import hub
from traceir.data.cot import FORMAT as COT_FORMAT
from traceir.data.cot import NAME
from traceir.data.report import code, line, number, render
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
    about = _read_json(Path(str(build["data"])) / "meta.json") if build.get("data") else {}
    source = line(about.get("name") or "data in M-BEIR's layout")
    complex_ = sum(int(task["complex"]) for task in manifest["tasks"].values())
    if quality is None and out is not None and (out / QUALITY / FILE).is_file():
        quality = read_quality(out / QUALITY / FILE)
    if quality is not None and quality.overall.funnel["curated"] != complex_:
        quality = None  # of another state of the data
    funnel = _read_json(out / "funnel.json").get("all", {}) if out is not None else {}
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
        columns=[[Markup(f"`{name}`"), _kind(kind), Markup(meaning)] for name, kind, meaning in COLUMNS],
        quality=quality,
        hallucination=Markup(estimate_in_words(quality.hallucination)) if quality else "",
        fault=Markup(estimate_in_words(quality.fault)) if quality else "",
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
    manifest = _read_json(file)
    if not manifest:
        raise DataError(f"{file} cannot be read; assemble the data to its end first")
    if manifest.get("name") != NAME or manifest.get("format") != COT_FORMAT:
        raise DataError(f"{file}: not a manifest of {NAME}, format {COT_FORMAT}; write the folder again with this release")
    for name in (entry["name"] for entry in manifest["files"]):
        if Path(name).name != name or not (folder / name).is_file():
            raise DataError(f"{folder / name} is missing, but named by the manifest; copy or write it again")
    return manifest


def _read_json(file: Path) -> dict[str, Any]:
    """{} where the file is not there, or holds another value."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{file} cannot be read ({error}); make it again") from error
    return content if isinstance(content, dict) else {}


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
        dataset_info={"features": [_column(column, kind) for column, kind, _ in COLUMNS]},
    )
    return f"{card.to_yaml()}\n"


def _column(name: str, kind: Any) -> dict[str, Any]:
    if isinstance(kind, str):
        return {"name": name, "dtype": kind}
    return {"name": name, "list": kind[0] if kind == ["string"] else [dict(field) for field in kind]}


def _kind(kind: Any) -> str:
    return kind if isinstance(kind, str) else "list of strings" if kind == ["string"] else "list of candidates"


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
    """The name a teacher is served by; of a path its last part: where somebody's files lie is nobody's business."""
    text = line(name or "")
    return Path(text).name if text.startswith(("/", "~", ".")) else text
