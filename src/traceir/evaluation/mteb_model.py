"""TraceIR under mteb, the public benchmark package: an encoder as one of its models, rows of a folder as tasks (extra `mteb`).

    model = TraceEncoder.of(Encoder.from_pretrained())
    mteb.evaluate(model, mbeir_task("data/minibeir", "cirr_task7"), cache=None)

`mteb_run.py` is the verb over it. Images need Pillow only, not the torchvision that mteb asks for. mteb does its own search and
its own scoring.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
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
from tqdm import tqdm

from traceir.data import mbeir
from traceir.data.folder import data_fingerprint
from traceir.encoder import Encoder
from traceir.errors import DataError, InputError
from traceir.evaluation.metrics import TIE
from traceir.images import ImageInput
from traceir.items import MODALITIES, Item, Modality, Part, Query, Route, Vector, check_route
from traceir.model import load
from traceir.retrieval.search import EncoderLike

log = logging.getLogger(__name__)

KS: Final = (1, 5, 10)
ABSENT: Final = "(no positive)"
"""Stands for the positives of a query that has none: mteb would leave such a query out, M-BEIR counts it as missed."""
_LETTERS: Final[Mapping[Modality, str]] = {"text": "t", "image": "i", "image,text": "it"}
_ROWS: Final = 256


class TraceEncoder(AbsEncoder):
    """Any encoder as mteb's EncoderProtocol: what it encodes as queries may reason, documents and everything else never do.

    Inputs of tasks without sides (classes, clusters, labels, captions, pairs) are encoded as documents are, without instruction.
    Queries get the task's own prompt (or their own, where the task has instructions by query) and the modality of the task's
    documents; mteb's general prompts by class ("Retrieve text based on user query.", of images too) are left out. The size of
    mteb's batches decides how many rows are in memory at a time, never what is encoded.

    mteb's loader calls it with the model's name, and with `embed_dim`, which is Encoder's `dim`; `source` says where the weights
    are, or is the encoder.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        *,
        device: str | None = None,
        source: str | Path | EncoderLike | None = None,
        route: Route = "auto",
        embed_dim: int | None = None,
        **options: Any,
    ) -> None:
        check_route(route)
        if source is None or isinstance(source, str | Path):
            source = Encoder(load(source or model_name, device=device or "cpu", **options), dim=embed_dim)
        self.encoder: EncoderLike = source
        self.route: Route = route
        # By the revision mteb tells results apart: the weights, and a digest of all else that decides a vector.
        settings = {"prompt_version": source.prompt_version, **getattr(source, "vector_settings", {})}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        revision = f"{re.sub(r'[^A-Za-z0-9.]+', '_', source.fingerprint)[:64]}-{digest[:8]}"
        self.mteb_model_meta = model_meta(model_name, revision, route=route, width=source.width, modalities=modalities_of(source))

    @classmethod
    def of(cls, encoder: EncoderLike, name: str = "traceir/local", *, route: Route = "auto") -> TraceEncoder:
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
        batch_size: int = _ROWS,
        show_progress_bar: bool = False,
        **_: Any,
    ) -> Vector:
        """Unit vectors [N, D] of a data loader's batches, in order; only `prompt_type` query takes the way that may reason."""
        target = _target(task_metadata) if prompt_type == PromptType.query else None
        title = f"{task_metadata.name} {hf_split}"
        vectors = [np.zeros((0, self.encoder.width), dtype=np.float32)]  # of no inputs
        total = len(getattr(inputs, "dataset", ())) or None
        with tqdm(total=total, desc=title, disable=not show_progress_bar, mininterval=2.0, leave=False) as bar:
            every = _rows(inputs)
            while rows := list(islice(every, batch_size)):  # whatever mteb's batches are: its image pairs come one by one
                if prompt_type == PromptType.query:
                    queries = [_query(row, task_metadata, target) for row in rows]
                    encodings = self.encoder.encode_queries(queries, route=self.route)
                else:
                    encodings = self.encoder.encode_items([Item(_parts(row, task_metadata.name)) for row in rows])
                vectors.append(np.stack([encoding.vector for encoding in encodings]))
                bar.update(len(rows))
        return np.concatenate(vectors)


def modalities_of(encoder: EncoderLike) -> tuple[Modality, ...]:
    """What an encoder takes as one input; all three where it does not say."""
    return tuple(getattr(encoder, "modalities", MODALITIES))


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
    modalities: Sequence[Modality] = MODALITIES,
    **options: Any,
) -> TraceMeta:
    """What mteb wants to know of a checkpoint; `model_meta(...).load_model()` loads it from `source` (a folder or hub id).

    A route other than auto counts as an experiment, so that mteb keeps its results apart. `options` (profile) go to `load`.
    Licence and languages are not ours to say of any checkpoint, and stay open.
    """
    meta: TraceMeta = TraceMeta.create_empty(
        {
            "loader": TraceEncoder,
            "loader_kwargs": {**({} if source is None else {"source": str(source)}), **options},
            "name": name,
            "revision": revision,
            "experiment_kwargs": None if route == "auto" else {"route": route},
            "modalities": [modality for modality in ("text", "image") if modality in modalities],
            "embed_dim": width,
            "similarity_fn_name": ScoringFunction.COSINE,
            "use_instructions": True,
            "framework": ["PyTorch"],
        }
    )
    return meta


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
        """Reads queries, pool and relevance of the row; images stay files until they are encoded."""
        if self.data_loaded:
            return
        task, relevant = self.row, mbeir.read_relevant(self.row)
        records = list(islice(mbeir.read_queries(task.query_path), self.limit))
        right = {record.qid: relevant.get(record.qid, set()) | set(record.positives) for record in records}
        items = [mbeir.to_item(candidate, task.root) for candidate in mbeir.read_pool(task.pool_path)]
        data = {
            "corpus": _dataset(items, task.cand_modality),
            "queries": _dataset([mbeir.to_query(record, None, task.root) for record in records], task.query_modality),
            "relevant_docs": {qid: dict.fromkeys(sorted(dids) or [ABSENT], 1) for qid, dids in right.items()},
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
        successes = {f"success_at_{k}": float(np.mean([scores[qid][f"success_{k}"] for qid in qrels])) for k in KS}
        ranks = np.full(len(qrels), np.inf)  # of the best positive among the results, ties against it
        for row, (qid, right) in enumerate(qrels.items()):
            if positives := [score for did, score in results[qid].items() if did in right]:
                wrong = [score for did, score in results[qid].items() if did not in right]
                ranks[row] = 1 + np.count_nonzero(np.array(wrong) >= max(positives) - TIE)
        return successes | {f"hit_at_{k}": float((ranks <= k).mean()) for k in KS}


def mbeir_task(root: str | Path, row: str, *, split: mbeir.Split = "test", limit: int | None = None) -> MbeirTask:
    """The row of a folder as an mteb task; `limit` takes its first so many queries. DataError where there is no such row."""
    tasks = {task.name: task for task in mbeir.find_tasks(root, split)}
    if row not in tasks:
        raise DataError(f"{root} has no row {row!r} in its {split} split; it has {', '.join(tasks)}")
    task = tasks[row]
    prompts = mbeir.read_instructions(task.root).prompts(task.dataset_id, task.query_modality, task.cand_modality)
    modalities = sorted({*task.query_modality.split(","), *task.cand_modality.split(",")})
    metadata = TaskMetadata(
        name=f"{task.root.resolve().name}-{task.name}",
        description=f"Row {task.name} of a local folder in M-BEIR's layout.",
        dataset={"path": str(task.root), "revision": str(data_fingerprint(task.root / "meta.json") or "local")},
        type="Retrieval" if modalities == ["text"] else "Any2AnyRetrieval",
        category=f"{_LETTERS[task.query_modality]}2{_LETTERS[task.cand_modality]}",
        modalities=modalities,
        eval_splits=[task.split],
        eval_langs=["eng-Latn"],
        main_score=f"hit_rate_at_{task.metric_k}",
        prompt={"query": prompts[0]},
        is_public=False,
    )
    own = {"metadata": metadata, "row": task, "limit": limit, "__doc__": MbeirTask.__doc__}
    made: MbeirTask = type(f"MbeirTask_{row}", (MbeirTask,), own)()
    return made


def _dataset(contents: Sequence[Query | Item], modality: Modality) -> Dataset:
    """Ids, and a column for each modality; images by path."""
    columns: dict[str, Any] = {"id": [content.id for content in contents]}
    features: dict[str, Any] = {"id": Value("string")}
    if "text" in modality:
        columns["text"], features["text"] = [content.text for content in contents], Value("string")
    if "image" in modality:
        columns["image"], features["image"] = [str(content.images[0].path) for content in contents], ImageFeature()
    return Dataset.from_dict(columns, features=Features(features))


def _rows(inputs: Any) -> Iterator[dict[str, Any]]:
    """The rows of a data loader's batches, one by one."""
    for batch in inputs:
        names = [name for name in ("text", "image", "query", "instruction") if name in batch]
        if not {"text", "image"} & set(names) or {"audio", "video"} & set(batch):
            raise InputError(f"a batch of mteb has {sorted(batch)}; TraceIR reads text and image")
        for values in zip(*(batch[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


def _query(row: Mapping[str, Any], task: TaskMetadata, target: Modality | None) -> Query:
    """With the task's own instruction for its queries; tasks with instructions by query hand over both apart, as `query` and
    `instruction`, and joined as `text`."""
    instruction = row.get("instruction")
    if instruction:
        row = {**row, "text": row.get("query", row.get("text"))}
    else:
        instruction = task.prompt.get("query") if isinstance(task.prompt, Mapping) else task.prompt
    return Query(_parts(row, task.name), instruction=instruction or None, target=target)


def _parts(row: Mapping[str, Any], task: str) -> tuple[Part, ...]:
    """The images of a row, then its text; some rows have a list of images."""
    images, text = row.get("image"), row.get("text")
    parts: list[Part] = []
    for image in images if isinstance(images, list | tuple) else [images]:
        if image is not None:
            if not isinstance(image, Image.Image):
                raise InputError(f"mteb hands over an image as {type(image).__name__}; TraceIR reads PIL images")
            parts.append(ImageInput.from_pil(image))
    if text is not None and not isinstance(text, str):
        raise InputError(f"{task} hands over a text as {type(text).__name__}; TraceIR reads strings")
    if text and text.strip():
        parts.append(text)
    if not parts:
        log.warning("%s has an input without any content; it is encoded as the text 'Empty.'", task)
        parts.append("Empty.")
    return tuple(parts)


def _target(task: TaskMetadata) -> Modality | None:
    """What the task's documents are; None where its metadata do not tell queries and documents apart."""
    if task.category is None:
        return None
    wanted = set(task.get_modalities(PromptType.document))
    if unknown := wanted - {"text", "image"}:
        raise InputError(f"{task.name} looks for {sorted(unknown)}; TraceIR embeds text and images")
    return "image,text" if len(wanted) == 2 else "image" if "image" in wanted else "text"
