"""A checkpoint or adapter made ready for the Hugging Face hub: its model card, a check of its files, and the upload.

The card says what the folder and its run say, and nothing else: base, data, configuration, scores of `traceir evaluate`. Text
that comes from data is escaped. Front matter: https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData
from safetensors import SafetensorError, safe_open

from traceir.adapter import Base, read_base, weights_fingerprint
from traceir.checkpoint import ADAPTER
from traceir.data import hub
from traceir.data import markdown as md
from traceir.errors import InputError, ModelError
from traceir.files import write_whole
from traceir.model import TraceSettings, read_settings
from traceir.weights import weight_files

MARK: Final = "<!-- Written by `traceir push`, which replaces it. Remove this line to keep what you change. -->"
RESULTS_FORMAT: Final = 2
PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
UPLOADED: Final = frozenset({".safetensors", ".json", ".jinja", ".md", ".txt", ".png", ".jpg", ".svg"})
STATE: Final = re.compile(r"^(optimi[sz]er|scheduler|scaler|rng_state|step|trainer_state|training_args)\b", re.IGNORECASE)
"""Files that only a training which goes on needs."""
MAX_FILE_BYTES: Final = 50 * 10**9
MAX_FILES: Final = 10_000
"""The hub's limits: bytes of a file, entries of a folder (huggingface.co/docs/hub/storage-limits)."""
READ_OUTS: Final = {
    "before_token": "the last hidden state at the position that predicts `<|emb|>`",
    "at_token": "the last hidden state at `<|emb|>` itself",
    "last": "the last hidden state at the end of the prompt",
}
"""What a request may raise; the HTTP library below huggingface_hub changes with its releases."""


@dataclass(frozen=True, slots=True)
class _Facts:
    """What a card is made of. `meta` is the meta.json of the run, empty where there is none."""

    name: str
    settings: TraceSettings
    fingerprint: str
    base: Base | None
    meta: dict[str, Any]
    data: str
    evaluations: tuple[dict[str, Any], ...]


def write_card(
    folder: Path,
    *,
    run: Path | None = None,
    evaluations: Sequence[Path] = (),
    repo: str | None = None,
    licence: str | None = None,
) -> str:
    """Writes README.md into a checkpoint or adapter folder and returns its text.

    `run` is the folder of the training (its meta.json; default: a meta.json in the folder itself), `evaluations` are folders
    that `traceir evaluate` wrote for this very checkpoint, `licence` an identifier of the hub such as apache-2.0. Raises
    InputError for evaluations of other weights and where README.md was written by hand.
    """
    readme = folder / "README.md"
    if readme.is_file() and MARK not in readme.read_text(encoding="utf-8"):
        raise InputError(f"{readme} was not written by traceir; remove it, or push without --run and --evaluation to keep it")
    facts = _facts(folder, run, evaluations, repo)
    parts = (_opening(facts), _loading(facts), _data(facts), _training(facts), _scores(facts), _limits(facts))
    text = f"---\n{_front_matter(facts, licence)}---\n\n{MARK}\n\n" + "\n".join(parts)
    write_whole(readme, text)
    return text


def push(folder: Path, repo: str, *, private: bool = True, dry_run: bool = True, revision: str | None = None) -> str:
    """Uploads a checkpoint or adapter folder to the hub and returns the address of the commit.

    With `dry_run` it only checks, needs no network, and returns what would be uploaded. The token is the one that `hf auth
    login` or HF_TOKEN has set; it is never read here. Raises ModelError for a folder that must not be uploaded, InputError for a
    bad name, TraceError where the hub refuses or cannot be reached; the upload can then be repeated.
    """
    hub.check_name(repo)
    return hub.upload(folder, uploaded_files(folder), repo, "model", private=private, dry_run=dry_run, revision=revision)


def uploaded_files(folder: Path) -> list[tuple[str, int]]:
    """Names and sizes in bytes of what is uploaded; hidden files stay. Raises ModelError for a folder that must not be."""
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give the folder of a checkpoint or an adapter, such as RUN/checkpoint")
    found = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in found:
        _check_file(path)
    if len(found) > MAX_FILES:
        raise ModelError(f"{folder} holds {len(found)} files, the hub takes {MAX_FILES}; this is hardly a checkpoint")
    _check_whole(folder)
    return [(path.name, path.stat().st_size) for path in found]


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise ModelError(f"{path} is a folder inside the checkpoint; push a plain checkpoint, such as RUN/checkpoint, not a run")
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path} may hold a pickle, which runs code where it is read; store weights as .safetensors and remove it"
        )
    if STATE.match(path.name):
        raise ModelError(f"{path} belongs to a training that goes on; push the result, RUN/checkpoint, not a step")
    if path.suffix.lower() not in UPLOADED:
        raise ModelError(f"{path} is no file of a checkpoint; remove it, or hide it by a name that begins with a dot")
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise ModelError(
            f"{path} has {md.size(size)}, the hub takes {md.size(MAX_FILE_BYTES)} a file; save the weights in shards"
        )


def _check_whole(folder: Path) -> None:
    """Weights, configuration and traceir.json are there, fit each other, and mean something to others."""
    base = read_base(folder) if (folder / ADAPTER).is_file() else None
    needed = ["traceir.json", "tokenizer.json"] if base is not None else ["config.json", "traceir.json", "tokenizer.json"]
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise ModelError(f"{folder} lacks {', '.join(missing)}; push a checkpoint that traceir has saved")
    if base is not None and not base.on_hub:
        raise ModelError(
            f"{folder} is an adapter over {base.source}, a folder that others do not have; push what `traceir merge` makes of it"
        )
    for file in {*weight_files(folder), *folder.glob("*.safetensors")}:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged: {error}; save the checkpoint again") from error
    settings = read_settings(folder / "traceir.json")
    if settings is not None and settings.fingerprint not in ("", actual := weights_fingerprint(folder)):
        raise ModelError(f"{folder} holds weights {actual}, its traceir.json is of {settings.fingerprint}; copy or save it again")


# The card


def _facts(folder: Path, run: Path | None, evaluations: Sequence[Path], repo: str | None) -> _Facts:
    if repo is not None:
        hub.check_name(repo)
    settings = read_settings(folder / "traceir.json")
    if settings is None:
        raise ModelError(f"{folder} holds no traceir.json; give the folder of a checkpoint or adapter that traceir has saved")
    base = read_base(folder) if (folder / ADAPTER).is_file() else None
    meta = _read_meta(folder, run)
    fingerprint = settings.fingerprint or weights_fingerprint(folder)
    results = tuple(_read_results(place, fingerprint) for place in evaluations)
    return _Facts(repo or md.code(folder.resolve().name), settings, fingerprint, base, meta, _data_name(meta), results)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); make it again") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} holds no JSON object; make it again")
    return found


def _read_meta(folder: Path, run: Path | None) -> dict[str, Any]:
    file = (run or folder) / "meta.json"
    if file.is_file():
        return _read_json(file)
    if run is not None:
        raise InputError(f"{run} holds no meta.json; give the folder of a finished training (`traceir train --out`)")
    return {}


def _read_results(folder: Path, fingerprint: str) -> dict[str, Any]:
    file = folder / "results.json" if folder.is_dir() else folder
    if not file.is_file():
        raise InputError(f"{folder} holds no results.json; give what `traceir evaluate --out` wrote")
    results = _read_json(file)
    if results.get("format") != RESULTS_FORMAT or not isinstance(results.get("routes"), dict):
        raise InputError(f"{file} is not of format {RESULTS_FORMAT} of `traceir evaluate`; evaluate again")
    if results.get("model") != fingerprint:
        raise InputError(f"{file} holds scores of {results.get('model')}, the folder is {fingerprint}; evaluate this very one")
    return results


def _data_name(meta: dict[str, Any]) -> str:
    """What the training data call themselves: in the run's meta.json, else in that of the data folder, else the folder's name."""
    if isinstance(meta.get("data"), str):
        return md.line(meta["data"])
    folder = Path(str(_config(meta).get("data") or ""))
    about = _read_json(folder / "meta.json") if folder.name and (folder / "meta.json").is_file() else {}
    if not about.get("name"):
        return md.line(folder.name)
    more = [f"{about['scale']} scale"] if "scale" in about else []
    more += [f"seed {about['seed']}"] if "seed" in about else []
    return md.line(", ".join([str(about["name"]), *more]))


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run, or of the last of its stages."""
    stages = meta.get("stages")
    if isinstance(stages, dict) and stages:
        meta = list(stages.values())[-1]
    found = meta.get("config")
    return found if isinstance(found, dict) else {}


def _front_matter(facts: _Facts, licence: str | None) -> str:
    short = facts.data.partition(",")[0]
    kinds = ["peft", "lora"] if facts.base is not None else ["qwen2_5_vl"]
    base_model = _base_model(facts)
    more = {"base_model_relation": "adapter" if facts.base is not None else "finetune"} if base_model else {}
    data = ModelCardData(
        library_name="traceir",
        base_model=base_model,
        pipeline_tag="feature-extraction",
        tags=["traceir", "multimodal-retrieval", "embeddings", "reasoning", *kinds],
        license=licence,
        datasets=[short] if short else None,
        model_name=facts.name.rpartition("/")[2],
        eval_results=list(_eval_results(facts)) or None,
        **more,
    )
    return f"{data.to_yaml()}\n"


def _base_model(facts: _Facts) -> str | None:
    """The hub id that training began with; None where it began with a folder or with nothing."""
    if facts.base is not None:
        return facts.base.source if facts.base.on_hub else None
    begun = str(_config(facts.meta).get("init") or "")
    plain = re.fullmatch(r"[\w.-]+/[\w.-]+", begun) and not begun.startswith((".", "~")) and not Path(begun).exists()
    return begun if plain else None


def _eval_results(facts: _Facts) -> Iterator[EvalResult]:
    for results in facts.evaluations:
        name = _evaluated(facts, results)
        for row, route, pool, scores in _rows(results):
            k = scores["metric_k"]
            yield EvalResult(
                task_type="retrieval",
                task_name="Multimodal retrieval",
                dataset_type=re.sub(r"[^\w.-]+", "-", name.lower()).strip("-"),
                dataset_name=f"{name}, {md.line(row)}",
                dataset_config=md.line(row),
                dataset_split=str(results.get("split")),
                dataset_revision=results.get("data"),
                metric_type=f"hit_at_{k}",
                metric_name=f"hit@{k}, route {route}, {pool} pool",
                metric_value=scores[f"hit@{k}"],
            )


def _rows(results: dict[str, Any]) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    """Row, route, kind of pool and scores, in the order of results.json."""
    for kind, pool in (("routes", "local"), ("global", "global")):
        for route, rows in results.get(kind, {}).items():
            yield from ((row, md.line(route), pool, scores) for row, scores in rows.items())


def _evaluated(facts: _Facts, results: dict[str, Any]) -> str:
    """The name of evaluated data: that of the training data if the fingerprints agree."""
    found = results.get("data")
    if found and found == facts.meta.get("data_fingerprint"):
        return facts.data.partition(",")[0]
    return f"data {str(found)[:16]}" if found else "unnamed data"


def _opening(facts: _Facts) -> str:
    settings = facts.settings
    budget = f"It may write up to {settings.max_reasoning_tokens} tokens of reasoning; "
    over = f" It is an adapter and needs its base, {md.escape(_base_name(facts.base))}." if facts.base is not None else ""
    return (
        f"# {md.escape(facts.name.rpartition('/')[2])}\n\n"
        "A model for multimodal retrieval: it embeds texts, pictures, and both together into one space, as queries and as "
        "candidates. A query that asks for something it does not show is reasoned about first: the model writes what is sought, "
        f"then `<|emb|>`. A simple query is embedded at once.{over}\n\n"
        f"Method: TRACE ([arXiv 2603.02929](https://arxiv.org/abs/2603.02929)). {budget}the embedding is "
        f"{READ_OUTS[settings.pooling_position]}, scaled to length 1. "
        f"Prompts: `{md.code(settings.prompt_version)}` of `traceir.prompts`. "
        f"Fingerprint of the weights: `{md.code(facts.fingerprint)}`.\n"
    )


def _base_name(base: Base) -> str:
    """A hub id, or a folder without the path that leads to it."""
    return base.source if base.on_hub else f"{Path(base.source).name} ({base.fingerprint})"


def _loading(facts: _Facts) -> str:
    name = json.dumps(facts.name)
    if facts.base is None:
        stock = (
            f"from transformers import AutoModelForImageTextToText\n\nmodel = AutoModelForImageTextToText.from_pretrained({name})"
        )
    else:
        base = json.dumps(facts.base.source if facts.base.on_hub else Path(facts.base.source).name)
        stock = (
            "from peft import PeftModel\nfrom transformers import AutoModelForImageTextToText\n\n"
            f"base = AutoModelForImageTextToText.from_pretrained({base})\nmodel = PeftModel.from_pretrained(base, {name})"
        )
    return (
        "## Use\n\n```python\nfrom traceir.encoder import Encoder\nfrom traceir.items import Item, Query\n"
        "from traceir.images import ImageInput\n\n"
        f"encoder = Encoder.from_pretrained({name})\n"
        '[query] = encoder.encode_queries([Query.of(text="make it red", image=ImageInput.open("chair.jpg"), target="image")])\n'
        '[candidate] = encoder.encode_items([Item.of(image=ImageInput.open("red-chair.jpg"))])\n'
        "print(query.route, query.reasoning, query.vector @ candidate.vector)\n```\n\n"
        f"On the command line: `traceir search --model {facts.name} ...`. The weights alone, without prompts, reasoning and "
        f"read-out, which TraceIR adds:\n\n```python\n{stock}\n```\n"
    )


def _data(facts: _Facts) -> str:
    if not facts.meta:
        return "## Data\n\nThe folder does not say what it was trained on.\n"
    lines = [
        f"- Name: {md.escape(facts.data) or 'not recorded'}",
        f"- Fingerprint: `{md.code(facts.meta.get('data_fingerprint'))}`",
    ]
    tasks = facts.meta.get("tasks")
    if isinstance(tasks, dict) and tasks:
        lines += ["", "| task | training examples |", "|---|---|"]
        lines += [f"| {md.escape(name)} | {md.escape(count)} |" for name, count in tasks.items()]
    return "## Data\n\n" + "\n".join(lines) + "\n"


def _training(facts: _Facts) -> str:
    if not facts.meta:
        return "## Training\n\nThe configuration of the training was not given.\n"
    shown = json.dumps(_without_paths({key: value for key, value in facts.meta.items() if key != "tasks"}), indent=2)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return f"## Training\n\nEverything that `traceir train` recorded:\n\n{fence}json\n{shown}\n{fence}\n"


def _without_paths(value: Any) -> Any:
    """The same with absolute paths cut to their last part: where somebody's files lie is nobody's business."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    for kind in (PurePosixPath, PureWindowsPath):
        if isinstance(value, str) and kind(value).is_absolute():
            return f".../{kind(value).name}"
    return value


def _scores(facts: _Facts) -> str:
    if not facts.evaluations:
        return "## Scores\n\nNone were given.\n"
    lines = ["| data | row | split | route | pool | queries | metric | % | reasoned % | tokens a query |"]
    lines.append("|---|---|---|---|---|---|---|---|---|---|")
    for results in facts.evaluations:
        about, split = md.escape(_evaluated(facts, results)), md.escape(results.get("split"))
        for kind, pool in (("average", "local"), ("average_global", "global")):
            for route, mean in results.get(kind, {}).items():
                shown = f"{100 * mean['mean']:.1f}"
                lines.append(f"| {about} | **all rows** | {split} | {md.escape(route)} | {pool} | | mean | **{shown}** | | |")
        for row, route, pool, scores in _rows(results):
            k = scores["metric_k"]
            lines.append(
                f"| {about} | {md.escape(row)} | {split} | {md.escape(route)} | {pool} {scores['pool']} "
                f"| {scores['queries']} | hit@{k} | {100 * scores[f'hit@{k}']:.1f} | {100 * scores['reasoned']:.0f} "
                f"| {scores['tokens_per_query']:.1f} |"
            )
    told = (
        "Measured by `traceir evaluate` on these very weights. hit@k: share of queries with a right candidate among the first k."
    )
    limited = any(results.get("limit") for results in facts.evaluations)
    return (
        f"## Scores\n\n{told}{' Only the first queries of each row were scored.' if limited else ''}\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _limits(facts: _Facts) -> str:
    return (
        "## Limits\n\n"
        "- Scores hold for the data they were measured on and say little about others.\n"
        "- Reasoning may be wrong, and then the embedding follows it. It is not filtered; do not show it as fact.\n"
        f"- Texts beyond {facts.settings.max_text_tokens} tokens are cut; reasoning that spends its budget is cut and marked.\n"
        "- Embeddings are comparable only with those of the same fingerprint.\n"
    )
