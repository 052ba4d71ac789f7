"""TraceIR under mteb, the public benchmark package: an Encoder as one of its models, rows of a folder as tasks (extra `judges`).

    model = TraceEncoder.of(Encoder.from_pretrained())
    mteb.evaluate(model, mbeir_task("data/minibeir", "cirr_task7"), cache=None)

Nothing is fetched: tasks read local files, and pictures need Pillow only. mteb does its own search and its own scoring.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ScoringFunction
from mteb.types import PromptType
from PIL import Image

from traceir.encoder import Encoder
from traceir.errors import DataError, InputError
from traceir.items import ROUTES, Item, Modality, Query, Route, Vector
from traceir.learn import mbeir
from traceir.learn.metrics import TIE
from traceir.model import load
from traceir.pictures import Picture

log = logging.getLogger(__name__)

KS: Final = (1, 5, 10)
ABSENT: Final = "(no positive)"
"""Stands for the positives of a query that has none: mteb would leave such a query out, M-BEIR counts it as missed."""
_LETTERS: Final[Mapping[Modality, str]] = {"text": "t", "image": "i", "image,text": "it"}
_CHUNK: Final = 256


class TraceEncoder(AbsEncoder):
    """An Encoder as mteb's EncoderProtocol: what it encodes as queries may reason, documents and everything else never do.

    The instruction of queries is the task's prompt (or the query's own, where the task has instructions by query), the modality
    they look for that of the task's documents. mteb's loader calls it with the model's name; `source` says where the weights are.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        source: str | Encoder | None = None,
        route: Route = "auto",
        **options: Any,
    ) -> None:
        if route not in ROUTES:
            raise InputError(f"route {route!r} is unknown; choose one of {', '.join(ROUTES)}")
        if not isinstance(source, Encoder):
            source = Encoder(load(source or model_name, device=device or "cpu", **options))
        self.encoder = source
        self.model = source
        self.route: Route = route
        self.mteb_model_meta = model_meta(model_name, self.encoder.fingerprint, route=route, width=self.encoder.width)

    @classmethod
    def of(cls, encoder: Encoder, name: str = "traceir/local", *, route: Route = "auto") -> TraceEncoder:
        """Around an encoder in memory; `name` ("organisation/model") is what mteb writes into its results."""
        return cls(name, source=encoder, route=route)

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **options: Any,
    ) -> Vector:
        """Unit vectors [N, D] of a data loader's batches, in order; only `prompt_type` query takes the road that may reason."""
        progress = bool(options.get("show_progress_bar", False))
        blocks: list[Vector] = []
        for rows in _chunks(inputs):
            if prompt_type == PromptType.query:
                instruction, target = self.get_task_instruction(task_metadata, prompt_type), _target(task_metadata)
                queries = [_query(row, instruction, target) for row in rows]
                found = self.encoder.encode_queries(queries, route=self.route, progress=progress)
            else:
                found = self.encoder.encode_items([_item(row, task_metadata.name) for row in rows], progress=progress)
            blocks.append(np.stack([one.vector for one in found]))
        return np.concatenate(blocks) if blocks else np.zeros((0, self.encoder.width), dtype=np.float32)


class TraceMeta(ModelMeta):
    """ModelMeta of a TraceEncoder. mteb asks for torchvision wherever a model reads images; ours reads them with Pillow."""

    def _resolve_extras_groups(self) -> list[str]:
        return []


def model_meta(
    name: str,
    revision: str | None,
    *,
    source: str | Path | None = None,
    route: Route = "auto",
    width: int | None = None,
    **options: Any,
) -> TraceMeta:
    """What mteb wants to know of a checkpoint; `model_meta(...).load_model()` loads it from `source` (a folder or hub id).

    A route other than auto counts as an experiment, so that mteb keeps its results apart. `options` (profile) go to `load`.
    """
    return TraceMeta(
        loader=TraceEncoder,
        loader_kwargs={**({} if source is None else {"source": str(source)}), **options},
        name=name,
        revision=revision,
        experiment_kwargs=None if route == "auto" else {"route": route},
        modalities=["text", "image"],
        embed_dim=width,
        similarity_fn_name=ScoringFunction.COSINE,
        use_instructions=True,
        framework=["PyTorch", "Transformers", "safetensors"],
        languages=["eng-Latn"],
        license="apache-2.0",
        open_weights=True,
        n_parameters=None,
        memory_usage_mb=None,
        max_tokens=None,
        release_date=None,
        public_training_code=None,
        public_training_data=None,
        training_datasets=None,
    )


def register(meta: ModelMeta) -> None:
    """Makes `mteb.get_model(meta.name)` and `mteb.get_model_meta(meta.name)` find a model, in this process."""
    from mteb.models.model_implementations import MODEL_REGISTRY

    MODEL_REGISTRY[str(meta.name)] = meta


class MbeirTask(AbsTaskRetrieval):
    """One row of a folder in M-BEIR's layout as an mteb task: local pool, first prompt, M-BEIR's hit rule.

    Its main score is mteb's `hit_rate_at_5` (10 for fashion), which mteb rounds to five digits. Beside it stand `success_at_K`,
    the same not rounded, and `hit_at_K`, where ties count against the query as in `traceir evaluate`; mteb breaks ties by id.
    Made by `mbeir_task`, because mteb keeps what describes a task on its class.
    """

    metadata = None
    row: mbeir.Task
    limit: int | None
    data_loaded: bool = False
    ignore_identical_ids = False  # a qid and a did may be the same string and name different things
    k_values = (1, 3, 5, 10, 20, 100)

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Reads queries, pool and relevance of the row; pictures stay files until they are encoded."""
        if self.data_loaded:
            return
        task = self.row
        relevant = mbeir.read_relevant(task)
        queries: list[Query] = []
        positives: dict[str, dict[str, int]] = {}
        for record in list(mbeir.read_queries(task.query_path))[: self.limit]:
            queries.append(mbeir.to_query(record, None, task.root))
            right = relevant.get(record.qid, set()) | set(record.positives)
            positives[record.qid] = dict.fromkeys(sorted(right) or [ABSENT], 1)
        items = [mbeir.to_item(candidate, task.root) for candidate in mbeir.read_pool(task.pool_path)]
        data = {
            "corpus": _dataset(items, task.cand_modality),
            "queries": _dataset(queries, task.query_modality),
            "relevant_docs": positives,
            "top_ranked": None,
        }
        self.dataset = {"default": {task.split: data}}
        self.data_loaded = True

    def task_specific_scores(
        self,
        scores: Mapping[str, Mapping[str, float]],
        qrels: Mapping[str, Mapping[str, int]],
        results: Mapping[str, Mapping[str, float]],
        hf_split: str,
        hf_subset: str,
    ) -> dict[str, float]:
        """Shares over all queries, from mteb's own scores and rankings: `success_at_K` and `hit_at_K`."""
        ranks = np.array([_rank(results[qid], right) for qid, right in qrels.items()])
        found = {f"success_at_{k}": float(np.mean([scores[qid][f"success_{k}"] for qid in qrels])) for k in KS}
        return {**found, **{f"hit_at_{k}": float((ranks <= k).mean()) for k in KS}}


def mbeir_task(root: str | Path, row: str, *, split: mbeir.Split = "test", limit: int | None = None) -> MbeirTask:
    """The row of a folder as an mteb task; `limit` takes its first so many queries. DataError where there is no such row."""
    found = {task.name: task for task in mbeir.find_tasks(root, split)}
    if row not in found:
        raise DataError(f"{root} has no row {row!r} in its {split} split; it has {', '.join(found)}")
    described = {"metadata": _describe(found[row]), "row": found[row], "limit": limit, "__doc__": MbeirTask.__doc__}
    made: MbeirTask = type(f"MbeirTask_{row}", (MbeirTask,), described)()
    return made


def _describe(task: mbeir.Task) -> TaskMetadata:
    prompts = mbeir.read_instructions(task.root).prompts(task.dataset_id, task.query_modality, task.cand_modality)
    about = task.root / "meta.json"
    revision = json.loads(about.read_text(encoding="utf-8")).get("fingerprint") if about.is_file() else None
    modalities = sorted({*task.query_modality.split(","), *task.cand_modality.split(",")})
    return TaskMetadata(
        name=f"{task.root.resolve().name}-{task.name}",
        description=f"Row {task.name} of a local folder in M-BEIR's layout.",
        dataset={"path": str(task.root), "revision": str(revision or "local")},
        type="Retrieval" if modalities == ["text"] else "Any2AnyRetrieval",
        category=f"{_LETTERS[task.query_modality]}2{_LETTERS[task.cand_modality]}",
        modalities=modalities,
        eval_splits=[task.split],
        eval_langs=["eng-Latn"],
        main_score=f"hit_rate_at_{task.metric_k}",
        prompt={"query": prompts[0]},
        is_public=False,
    )


def _dataset(contents: Sequence[Query | Item], modality: Modality) -> Dataset:
    """Ids, and a column for each modality; pictures by path."""
    columns: dict[str, Any] = {"id": [one.id for one in contents]}
    features: dict[str, Any] = {"id": Value("string")}
    if "text" in modality:
        columns["text"], features["text"] = [one.text for one in contents], Value("string")
    if "image" in modality:
        columns["image"], features["image"] = [str(one.pictures[0].path) for one in contents], ImageFeature()
    return Dataset.from_dict(columns, features=Features(features))


def _rank(scores: Mapping[str, float], right: Mapping[str, int]) -> float:
    """Rank of the best positive among the results, ties against it; infinite where no positive is among them."""
    best = max((score for did, score in scores.items() if did in right), default=None)
    if best is None:
        return float("inf")
    return 1.0 + sum(score >= best - TIE for did, score in scores.items() if did not in right)


def _chunks(inputs: Any) -> Iterator[list[dict[str, Any]]]:
    """The rows of a data loader's batches, in chunks of about `_CHUNK`, so that many can decode together."""
    rows: list[dict[str, Any]] = []
    for batch in inputs:
        names = [name for name in ("text", "image", "query", "instruction") if name in batch]
        if not {"text", "image"} & set(names):
            raise InputError(f"a batch of mteb has {sorted(batch)}; TraceIR reads text and image")
        rows += [dict(zip(names, values, strict=True)) for values in zip(*(batch[name] for name in names), strict=True)]
        if len(rows) >= _CHUNK:
            yield rows
            rows = []
    if rows:
        yield rows


def _query(row: Mapping[str, Any], instruction: str, target: Modality | None) -> Query:
    """Tasks with instructions by query hand over both apart, as `query` and `instruction`, and joined as `text`."""
    text = row.get("text")
    if row.get("instruction"):
        instruction, text = row["instruction"], row.get("query", text)
    return Query.of(text=text or None, image=_picture(row.get("image")), instruction=instruction or None, target=target)


def _item(row: Mapping[str, Any], task: str) -> Item:
    text, image = row.get("text") or "", _picture(row.get("image"))
    if not text.strip() and image is None:
        log.warning("%s has a document without any content; it is encoded as the text 'Empty.'", task)
        text = "Empty."
    return Item.of(text=text or None, image=image)


def _picture(image: Any) -> Picture | None:
    if image is None:
        return None
    if not isinstance(image, Image.Image):
        raise InputError(f"mteb hands over a picture as {type(image).__name__}; TraceIR reads PIL images")
    return Picture.from_image(image)


def _target(task_metadata: TaskMetadata) -> Modality | None:
    """What the task's documents are; None where its metadata do not tell queries and documents apart."""
    if task_metadata.category is None:
        return None
    wanted = set(task_metadata.get_modalities(PromptType.document))
    if unknown := wanted - {"text", "image"}:
        raise InputError(f"{task_metadata.name} looks for {sorted(unknown)}; TraceIR embeds text and images")
    return "image,text" if len(wanted) == 2 else "image" if "image" in wanted else "text"
