"""Hard negatives: a folder in M-BEIR's layout whose training queries name the model's own best wrong hits.

What a reranker learns from (`traceir train --preset mini-yes-no`): `query/train/` with `neg_cand_list` and `cand_scores` filled,
`cot/train/` with what the model itself wrote, right or wrong, as it will at search; all else of the source is linked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np

from traceir.data import mbeir
from traceir.errors import DataError
from traceir.evaluation.embeddings import Embedder
from traceir.evaluation.ranking import NO_POSITION, Pool, rank_queries
from traceir.files import replacing_folder, write_whole
from traceir.items import Encoding, Query
from traceir.retrieval.search import EncoderLike

log = logging.getLogger(__name__)

Lines = tuple[dict[str, Any], dict[str, Any]]
OWN: Final = ("query", "cot", "meta.json")
"""Entries of the new folder that are not links to the source's."""


def mine(
    encoder: EncoderLike, data: Path, out: Path, *, k: int = 20, limit: int | None = None, seed: int = 0, progress: bool = False
) -> Path:
    """Writes the folder `out`: of each training task of `data` at most `limit` queries, drawn by `seed`, each with the `k`
    nearest candidates of its task that are not among its positives, nearest first.

    Queries take the route that the model chooses, under one of the task's instructions. Embeddings are kept below
    `out`.embeddings, so that an interruption costs a block. Raises DataError where the folder has no training split.
    """
    embedder = Embedder(encoder, out.with_name(f"{out.name}.embeddings"), progress=progress)
    pool, instructions = list(mbeir.read_pool(mbeir.train_pool_path(data))), mbeir.read_instructions(data)
    written: dict[str, list[Lines]] = {}
    for dataset in mbeir.train_datasets(data):
        records = sorted(mbeir.read_train(data, dataset), key=lambda record: record.task_id)
        labels = mbeir.read_labels(mbeir.train_labels_path(data, dataset))
        for task_id, of_task in groupby(records, key=lambda record: record.task_id):
            drawn = _drawn(list(of_task), limit, seed)
            log.info("%s_task%d: %d queries", dataset, task_id, len(drawn))
            number, modalities = mbeir.dataset_id_in(drawn[0].qid, "the train split"), mbeir.TASK_MODALITIES[task_id]
            queries = partial(_queries, drawn, instructions.prompts(number, *modalities), data, seed)
            candidates = [one for one in pool if one.modality == modalities[1] and one.did.startswith(f"{number}:")]
            for record, found, encoding in _searched(embedder, drawn, queries, candidates, data, k):
                written.setdefault(dataset, []).append(_lines(record, labels.get(record.qid), found, encoding))
    if not written:
        raise DataError(f"{data} has no query/train/*.jsonl; build or download the train split first")
    about = json.loads((data / "meta.json").read_text()) if (data / "meta.json").is_file() else {}
    about = {
        "source_fingerprint": about.get("fingerprint"),
        "mined_with": encoder.fingerprint,
        "k": k,
        "limit": limit,
        "seed": seed,
    }
    with replacing_folder(out) as fresh:
        for entry in sorted(data.iterdir()):
            if entry.name not in OWN:
                (fresh / entry.name).symlink_to(entry.resolve())
        for dataset, pairs in written.items():
            for side, path in enumerate((mbeir.train_path(fresh, dataset), mbeir.train_labels_path(fresh, dataset))):
                write_whole(path, "".join(json.dumps(pair[side], ensure_ascii=False) + "\n" for pair in pairs))
        write_whole(fresh / "meta.json", json.dumps(about, indent=1) + "\n")
    return out


def _searched(
    embedder: Embedder,
    drawn: Sequence[mbeir.Record],
    queries: Callable[[], Iterator[Query]],
    candidates: Sequence[mbeir.Candidate],
    data: Path,
    k: int,
) -> Iterator[tuple[mbeir.Record, dict[str, float], Encoding]]:
    """Each query with its positives and the best k others, nearest first, and their scores."""
    embedded = embedder.queries(queries, len(drawn), "auto")
    offered = embedder.items(lambda: (mbeir.to_item(candidate, data) for candidate in candidates), len(candidates))
    assert embedded is not None and offered is not None  # one process encodes all
    pool, vectors_QD = Pool([([candidate.did for candidate in candidates], offered)]), embedded.matrix()
    right = [pool.positions(record.positives) for record in drawn]
    ranking = rank_queries(vectors_QD, pool, right, top_k=min(k, len(pool)), excluded=right)
    vectors_ND = np.concatenate(list(pool))
    for record, vector, own, others, encoding in zip(
        drawn, vectors_QD, right, ranking.positions, embedded.encodings(), strict=True
    ):
        at = np.concatenate([own, others[others != NO_POSITION]])
        scores = (vectors_ND[at] @ vector).astype(float).round(6)
        yield record, dict(zip(map(pool.did, at.tolist()), scores.tolist(), strict=True)), encoding


def _drawn(records: Sequence[mbeir.Record], limit: int | None, seed: int) -> list[mbeir.Record]:
    """At most `limit` of them, in the order of the file."""
    if limit is None or len(records) <= limit:
        return list(records)
    chosen = np.random.default_rng((seed, records[0].task_id)).choice(len(records), size=limit, replace=False)
    return [records[number] for number in sorted(chosen.tolist())]


def _queries(records: Sequence[mbeir.Record], prompts: Sequence[str], data: Path, seed: int) -> Iterator[Query]:
    draw = np.random.default_rng(seed)
    return (mbeir.to_query(record, prompts[int(draw.integers(len(prompts)))], data) for record in records)


def _lines(record: mbeir.Record, label: mbeir.Label | None, scores: Mapping[str, float], encoding: Encoding) -> Lines:
    """The query and its label as they stand in the files."""
    query = {
        "qid": record.qid, "query_txt": record.text, "query_img_path": record.image_path, "query_modality": record.modality,
        "query_src_content": record.source, "pos_cand_list": list(record.positives),
        "neg_cand_list": [did for did in scores if did not in record.positives], "cand_scores": scores, "task_id": record.task_id,
    }  # fmt: skip
    wrote, steps = encoding.reasoning or None, 0 if label is None else label.steps
    return query, {"qid": record.qid, "steps": steps, "z": int(wrote is not None), "reasoning": wrote, "answer": None}
