"""Is the reasoning used, or decoration? Other reasonings are put in the model's mouth, and vectors and recall are watched.

Users found that a peer's embeddings hardly depended on what it had written. Here each complex query is encoded again with a
reasoning given to it: its own (a control), the label's, none, half of its own, and another query's of the same row. If the
reasoning is used, the label's raises recall, none lowers it, and another's moves the hits to the other query's target.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch.nn import functional

from traceir.data import mbeir
from traceir.data.report import render
from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.evaluation.evaluate import choose_tasks
from traceir.evaluation.metrics import rank_positives
from traceir.files import write_whole
from traceir.items import Query, Vector
from traceir.prompts import completion_text

log = logging.getLogger(__name__)

KINDS: Final = {
    "own": "what the model wrote by itself, read again (control)",
    "label": "the label's reasoning and answer",
    "blank": "nothing: `<|emb|>` at once",
    "half": "the first half of its own, then `<|emb|>`",
    "swapped": "another query's of the same row",
}
"""What each query is given to have written."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What one kind of reasoning does to the queries of a row: n of them, recall at 1 and at the row's k, mean cosine to the
    vector of the model's own reasoning; under `swapped` also the share whose first hit is a target of the other query."""

    row: str
    kind: str
    queries: int
    hit_1: float
    hit_k: float
    cosine: float
    hit_1_of_other: float | None


def probe(
    encoder: Encoder, data: Path, out: Path, *, split: mbeir.Split = "test", rows: Sequence[str] | None = None,
    limit: int | None = None, progress: bool = True,
) -> list[Probe]:  # fmt: skip
    """Probes every row with at least two queries that reason by themselves and have a reasoning in their label.

    `limit` counts such queries of each row. Writes faithful.json and faithful.md to `out`. Raises InputError where no row has
    any, and for a checkpoint whose queries write nothing.
    """
    if not encoder.model.writes("query"):
        raise InputError("this checkpoint is read at the end of its prompt and writes no reasoning; there is nothing to probe")
    probes: list[Probe] = []
    for task in choose_tasks(mbeir.find_tasks(data, split), rows, data):
        labels = {qid: label for qid, label in mbeir.read_labels(task.labels_path).items() if label.z}
        records = [record for record in mbeir.read_queries(task.query_path) if record.qid in labels]
        if len(records) >= 2:
            probes += _probe_row(encoder, task, data, records[:limit], labels, progress)
    if not probes:
        raise InputError(f"{data}: no row of split {split} has two queries that reason and have a reasoning label")
    header = {"format": 1, "model": encoder.fingerprint, "data": str(data.name), "split": split, "limit": limit}
    write_whole(out / "faithful.json", json.dumps({**header, "probes": [asdict(each) for each in probes]}, indent=1) + "\n")
    write_whole(out / "faithful.md", table(probes, encoder.fingerprint))
    return probes


@torch.inference_mode()
def encode_given(encoder: Encoder, queries: Sequence[Query], reasonings: Sequence[str]) -> Vector:
    """Vectors [Q, D] of queries as if the model had written these reasonings ("" for none) and then `<|emb|>`."""
    model = encoder.model
    layouts = [
        model.processor.lay_out(model.prompt(query), reasoning) for query, reasoning in zip(queries, reasonings, strict=True)
    ]
    vectors = np.empty((len(layouts), encoder.width), dtype=np.float32)
    order = sorted(range(len(layouts)), key=lambda number: len(layouts[number]))
    for first in range(0, len(order), 64):
        numbers = order[first : first + 64]
        batch = model.processor.collate([layouts[number] for number in numbers]).to(model.device)
        state_BD = model.hidden(batch)[torch.arange(len(numbers), device=model.device), batch.pooling_index]
        vectors[numbers] = functional.normalize(state_BD[:, : encoder.dim].float(), dim=-1).cpu().numpy()
    return vectors


def table(probes: Sequence[Probe], model: str) -> str:
    """The probes as Markdown: all rows together, weighted by their queries, then each row."""
    whole = []
    for kind in KINDS:
        own = [each for each in probes if each.kind == kind]
        queries = [each.queries for each in own]
        values = [[each.hit_1, each.hit_k, each.cosine, each.hit_1_of_other or 0.0] for each in own]
        hit_1, hit_k, cosine, of_other = map(float, np.average(values, axis=0, weights=queries))
        other = None if own[0].hit_1_of_other is None else of_other
        whole.append(Probe("**all**", kind, sum(queries), hit_1, hit_k, cosine, other))
    return render("lab/templates/faithful.md.j2", model=model, kinds=KINDS, probes=[*whole, *probes])


def _probe_row(
    encoder: Encoder, task: mbeir.Task, data: Path, records: Sequence[mbeir.Record], labels: Mapping[str, mbeir.Label],
    progress: bool,
) -> list[Probe]:  # fmt: skip
    prompts = mbeir.read_instructions(data).prompts(task.dataset_id, task.query_modality, task.cand_modality)
    queries = [mbeir.to_query(record, prompts[0], data) for record in records]
    encodings = encoder.encode_queries(queries, progress=progress)
    kept = [number for number, encoding in enumerate(encodings) if encoding.route == "reason"]
    if len(kept) < 2:
        log.info("%s: fewer than two of %d complex queries reason; left out", task.name, len(queries))
        return []
    candidates = list(mbeir.read_pool(task.pool_path))
    items = [mbeir.to_item(candidate, data) for candidate in candidates]
    pool_ND = np.stack([encoding.vector for encoding in encoder.encode_items(items, progress=progress)])
    records, queries, encodings = [records[n] for n in kept], [queries[n] for n in kept], [encodings[n] for n in kept]
    own_QD = np.stack([encoding.vector for encoding in encodings])
    relevant, dids = mbeir.read_relevant(task), np.array([candidate.did for candidate in candidates])
    targets = [list(relevant.get(record.qid, set()) | set(record.positives)) for record in records]
    relevant_QN = np.stack([np.isin(dids, own) for own in targets])
    written = [encoding.reasoning for encoding in encodings]
    reasonings_by_kind = {
        "own": written,
        "label": [completion_text(labels[record.qid].reasoning, labels[record.qid].answer) for record in records],
        "blank": [""] * len(written),
        "half": [" ".join(text.split(" ")[: len(text.split(" ")) // 2]) for text in written],
        "swapped": [*written[1:], written[0]],
    }
    probes = []
    for kind, reasonings in reasonings_by_kind.items():
        vectors_QD = encode_given(encoder, queries, reasonings)
        scores_QN = vectors_QD @ pool_ND.T
        ranks = rank_positives(scores_QN, relevant_QN)
        of_other = float((rank_positives(scores_QN, np.roll(relevant_QN, -1, axis=0)) == 1).mean()) if kind == "swapped" else None
        cosine = float((vectors_QD * own_QD).sum(axis=1).mean())
        hits = [float((ranks <= k).mean()) for k in (1, task.metric_k)]
        probes.append(Probe(task.name, kind, len(records), hits[0], hits[1], round(cosine, 4), of_other))
    return probes
