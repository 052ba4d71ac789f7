"""A checkpoint or adapter made ready for the Hugging Face hub: its model card, a check of its files, and the upload.

The card (`model_card.md.j2`) says what the folder and its run say, and nothing else: base, data, configuration, scores of
`traceir evaluate`. Front matter: https://github.com/huggingface/hub-docs/blob/main/modelcard.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

from huggingface_hub import EvalResult, ModelCardData
from markupsafe import Markup
from safetensors import SafetensorError, safe_open

from traceir.adapter import Base, read_base, weights_fingerprint
from traceir.checkpoint import ADAPTER, weight_files
from traceir.data import hub
from traceir.data.report import code, escape, line, render, size
from traceir.errors import InputError, ModelError
from traceir.files import write_whole
from traceir.model import read_settings

MARK: Final = "<!-- Written by `traceir push`, which replaces it. Remove this line to keep what you change. -->"
RESULTS_FORMAT: Final = 2
PICKLES: Final = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib"})
UPLOADED: Final = frozenset({".safetensors", ".json", ".jinja", ".md", ".txt", ".png", ".jpg", ".svg"})
STATE: Final = re.compile(r"^(optimi[sz]er|scheduler|scaler|rng_state|step|trainer_state|training_args)\b", re.IGNORECASE)
"""Files that only a training which goes on needs."""
MAX_FILE_BYTES: Final = 50 * 10**9
MAX_FILES: Final = 10_000
"""The hub's limits: bytes of a file, entries of a folder (huggingface.co/docs/hub/storage-limits)."""
POOLING: Final = {
    "before_token": Markup("the last hidden state at the position that predicts `<|emb|>`"),
    "at_token": Markup("the last hidden state at `<|emb|>` itself"),
    "last": "the last hidden state at the end of the prompt",
}

Row = tuple[str, str, str, dict[str, Any]]
"""Of results.json: row, route, kind of pool, scores."""


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
    if repo is not None:
        hub.check_name(repo)
    settings = read_settings(folder / "traceir.json")
    if settings is None:
        raise ModelError(f"{folder} holds no traceir.json; give the folder of a checkpoint or adapter that traceir has saved")
    file = (run or folder) / "meta.json"
    missing = f"{run} holds no meta.json; give the folder of a finished training (`traceir train --out`)"
    meta = _read_json(file, missing) if run is not None or file.is_file() else {}
    name, base = repo or str(code(folder.resolve().name)), _base(folder)
    title, data, fingerprint = name.rpartition("/")[2], _data_name(meta), settings.fingerprint or weights_fingerprint(folder)
    read = [_read_results(folder_or_file, fingerprint) for folder_or_file in evaluations]
    named = [(_evaluated(results, meta, data), results) for results in read]
    text = render(
        "train/model_card.md.j2",
        front_matter=Markup(_front_matter(title, data, base, meta, named, licence)),
        mark=Markup(MARK),
        name=name,
        title=title,
        base=base,
        base_folder=Path(base.source).name if base else "",
        settings=settings,
        pooling=POOLING[settings.pooling_position],
        fingerprint=fingerprint,
        data=data,
        meta=meta,
        tasks=list(meta["tasks"].items()) if isinstance(meta.get("tasks"), dict) else [],
        recorded=_recorded(meta),
        scores=[row for name, results in named for row in _score_rows(name, results)],
        limited=any(results.get("limit") for results in read),
    )
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
    """Names and sizes in bytes of what is uploaded; hidden files stay.

    Raises ModelError for a folder that must not be: weights, configuration and traceir.json are there, fit each other, and mean
    something to others.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder; give the folder of a checkpoint or an adapter, such as RUN/checkpoint")
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in files:
        if problem := _problem(path):
            raise ModelError(f"{path} {problem}")
    if len(files) > MAX_FILES:
        raise ModelError(f"{folder} holds {len(files)} files, the hub takes {MAX_FILES}; this is hardly a checkpoint")
    base = _base(folder)
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
    return [(path.name, path.stat().st_size) for path in files]


def _problem(path: Path) -> str:
    """Why a file must not be uploaded, and what to do; "" where it may."""
    if path.is_dir():
        return "is a folder inside the checkpoint; push a plain checkpoint, such as RUN/checkpoint, not a run"
    if path.suffix.lower() in PICKLES:
        return "may hold a pickle, which runs code where it is read; store weights as .safetensors and remove it"
    if STATE.match(path.name):
        return "belongs to a training that goes on; push the result, RUN/checkpoint, not a step"
    if path.suffix.lower() not in UPLOADED:
        return "is no file of a checkpoint; remove it, or hide it by a name that begins with a dot"
    if (count := path.stat().st_size) > MAX_FILE_BYTES:
        return f"has {size(count)}, the hub takes {size(MAX_FILE_BYTES)} a file; save the weights in shards"
    return ""


def _base(folder: Path) -> Base | None:
    return read_base(folder) if (folder / ADAPTER).is_file() else None


def _read_json(file: Path, missing: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(missing) from error
    except ValueError as error:
        raise InputError(f"{file} is not JSON ({error}); make it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object; make it again")
    return content


def _read_results(folder: Path, fingerprint: str) -> dict[str, Any]:
    file = folder / "results.json" if folder.is_dir() else folder
    results = _read_json(file, f"{folder} holds no results.json; give what `traceir evaluate --out` wrote")
    if results.get("format") != RESULTS_FORMAT or not isinstance(results.get("routes"), dict):
        raise InputError(f"{file} is not of format {RESULTS_FORMAT} of `traceir evaluate`; evaluate again")
    if results.get("model") != fingerprint:
        raise InputError(f"{file} holds scores of {results.get('model')}, the folder is {fingerprint}; evaluate this very one")
    return results


def _data_name(meta: dict[str, Any]) -> str:
    """What the training data call themselves: in the run's meta.json, else in that of the data folder, else the folder's name."""
    if isinstance(meta.get("data"), str):
        return line(meta["data"])
    folder = Path(str(_config(meta).get("data") or ""))
    about = _read_json(folder / "meta.json", "") if folder.name and (folder / "meta.json").is_file() else {}
    if not about.get("name"):
        return line(folder.name)
    forms = {"name": "{}", "scale": "{} scale", "seed": "seed {}"}
    return line(", ".join(form.format(about[key]) for key, form in forms.items() if key in about))


def _config(meta: dict[str, Any]) -> dict[str, Any]:
    """The configuration of the run, or of the last of its stages."""
    stages = meta.get("stages")
    config = (list(stages.values())[-1] if isinstance(stages, dict) and stages else meta).get("config")
    return config if isinstance(config, dict) else {}


def _front_matter(
    title: str, data: str, base: Base | None, meta: dict[str, Any], named: Sequence[tuple[str, dict[str, Any]]],
    licence: str | None,
) -> str:  # fmt: skip
    """`base_model` is the hub id that training began with; it is left out where it began with a folder or with nothing."""
    begun = base.source if base is not None and base.on_hub else ""
    if base is None:
        init = str(_config(meta).get("init") or "")
        begun = init if re.fullmatch(r"\w[\w.-]*/[\w.-]+", init) and not Path(init).exists() else ""
    short, kinds = data.partition(",")[0], ["peft", "lora"] if base is not None else ["qwen2_5_vl"]
    more = {"base_model_relation": "adapter" if base is not None else "finetune"} if begun else {}
    card = ModelCardData(
        library_name="traceir",
        base_model=begun or None,
        pipeline_tag="feature-extraction",
        tags=["traceir", "multimodal-retrieval", "embeddings", "reasoning", *kinds],
        license=licence,
        datasets=[short] if short else None,
        model_name=title,
        eval_results=[_eval_result(name, results, row) for name, results in named for row in _rows(results)] or None,
        **more,
    )
    return f"{card.to_yaml()}\n"


def _eval_result(name: str, results: dict[str, Any], row: Row) -> EvalResult:
    row_name, route, pool, scores = row
    k = scores["metric_k"]
    return EvalResult(
        task_type="retrieval",
        task_name="Multimodal retrieval",
        dataset_type=re.sub(r"[^\w.-]+", "-", name.lower()).strip("-"),
        dataset_name=f"{name}, {line(row_name)}",
        dataset_config=line(row_name),
        dataset_split=str(results.get("split")),
        dataset_revision=results.get("data"),
        metric_type=f"hit_at_{k}",
        metric_name=f"hit@{k}, route {line(route)}, {pool} pool",
        metric_value=scores[f"hit@{k}"],
    )


def _rows(results: dict[str, Any]) -> Iterator[Row]:
    for kind, pool in (("routes", "local"), ("global", "global")):
        for route, rows in results.get(kind, {}).items():
            yield from ((row, route, pool, scores) for row, scores in rows.items())


def _score_rows(name: str, results: dict[str, Any]) -> Iterator[list[object]]:
    """Of the card's table: averages, then row by row."""
    split = results.get("split")
    for kind, pool in (("average", "local"), ("average_global", "global")):
        for route, mean in results.get(kind, {}).items():
            shown = Markup(f"**{100 * mean['mean']:.1f}**")
            yield [name, Markup("**all rows**"), split, route, pool, "", "mean", shown, "", ""]
    for row, route, pool, scores in _rows(results):
        metric = f"hit@{scores['metric_k']}"
        shares = f"{100 * scores[metric]:.1f}", f"{100 * scores['reasoned']:.0f}", f"{scores['tokens_per_query']:.1f}"
        shown = Markup(f"hit@{escape(scores['metric_k'])}")
        yield [name, row, split, route, f"{pool} {scores['pool']}", scores["queries"], shown, *shares]


def _evaluated(results: dict[str, Any], meta: dict[str, Any], data: str) -> str:
    """The name of evaluated data: that of the training data if the fingerprints agree."""
    digest = results.get("data")
    if digest and digest == meta.get("data_fingerprint"):
        return data.partition(",")[0]
    return f"data {str(digest)[:16]}" if digest else "unnamed data"


def _recorded(meta: dict[str, Any]) -> Markup:
    """meta.json without its tasks as a block of code that no text in it can end."""
    shown = json.dumps(_without_paths({key: value for key, value in meta.items() if key != "tasks"}), indent=2)
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    return Markup(f"{fence}json\n{shown}\n{fence}")


def _without_paths(value: Any) -> Any:
    """The same with absolute paths cut to their last part: a card does not show where files lie."""
    if isinstance(value, dict):
        return {key: _without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_paths(part) for part in value]
    for kind in (PurePosixPath, PureWindowsPath):
        if isinstance(value, str) and kind(value).is_absolute():
            return f".../{kind(value).name}"
    return value
