"""Third-party evaluation: sentence-transformers and mteb give the vectors and the hit rates that we give ourselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from conftest import image_of
from datasets import Dataset
from evaluations import Planned, asks, candidate, planned_folder
from mteb.models import EncoderProtocol
from mteb.types import PromptType
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from traceir.checkpoint import bundled_model
from traceir.encoder import Encoder
from traceir.errors import DataError, InputError
from traceir.evaluation.evaluate import evaluate
from traceir.evaluation.mteb_model import KS, TraceEncoder, mbeir_task, model_meta, register
from traceir.evaluation.results import read_outcomes
from traceir.images import ImageInput
from traceir.items import Item, Query
from traceir.model import TraceModel, save
from traceir.sentence import as_sentence_transformer, encode_with_reasoning

LIMIT = 8
QUIET: dict[str, Any] = {"show_progress_bar": False, "batch_size": 16}


def scores_of(model: TraceEncoder, task: Any) -> dict[str, float]:
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, encode_kwargs=dict(QUIET))
    scores: dict[str, float] = result.task_results[0].scores["test"][0]
    return scores


@pytest.mark.slow
@pytest.mark.parametrize("row", ["cirr_task7", "webqa_task2"])
def test_mteb_counts_the_same_hits(encoder: Encoder, folder: Path, tmp_path: Path, row: str) -> None:
    evaluate(encoder, folder, tmp_path, rows=[row], limit=LIMIT, progress=False)
    ranks = np.array([outcome.rank for outcome in read_outcomes(tmp_path / "queries-auto.jsonl")])
    assert len(ranks) == LIMIT
    theirs = scores_of(TraceEncoder.of(encoder), mbeir_task(folder, row, limit=LIMIT))
    rates = {k: float((ranks <= k).mean()) for k in KS}
    for k, ours in rates.items():
        assert theirs[f"success_at_{k}"] == pytest.approx(ours, abs=1e-6) == theirs[f"hit_at_{k}"]
        assert theirs[f"hit_rate_at_{k}"] == round(ours, 5)
    assert theirs["main_score"] == theirs["hit_rate_at_5"]
    assert 0.0 < rates[1] < 1.0, "a rate that a wrong prompt or pool would change"


@pytest.mark.slow
def test_mteb_lets_only_queries_reason_with_their_instructions(encoder: Encoder, folder: Path) -> None:
    task = mbeir_task(folder, "cirr_task7", limit=6)
    task.load_data()
    rows = task.dataset["default"]["test"]["queries"]
    loader = DataLoader(rows, batch_size=4, collate_fn=lambda batch: {key: [row[key] for row in batch] for key in batch[0]})
    parts = [{"text": row["text"], "image": ImageInput.from_pil(row["image"])} for row in rows]
    queries = [Query.of(**content, instruction=task.metadata.prompt["query"], target="image") for content in parts]
    reasoned = encoder.encode_queries(queries, route="reason")
    assert all(encoding.route == "reason" for encoding in reasoned)
    plain = encoder.encode_items([Item.of(**content) for content in parts])
    thinking, options = TraceEncoder.of(encoder, route="reason"), {"hf_split": "test", "hf_subset": "default"}
    for side, wanted in ((PromptType.query, reasoned), (PromptType.document, plain), (None, plain)):
        ours = thinking.encode(loader, task_metadata=task.metadata, prompt_type=side, **options)
        assert np.abs(ours - [encoding.vector for encoding in wanted]).max() < 1e-6
    options |= {"task_metadata": mbeir_task(folder, "webqa_task1").metadata}
    own = Dataset.from_dict({"text": ["red cube find it"], "query": ["red cube"], "instruction": ["find it"]})
    model = TraceEncoder.of(encoder)
    (asked,) = encoder.encode_queries([Query.of(text="red cube", instruction="find it", target="text")])
    assert np.abs(model.encode(DataLoader(own), prompt_type=PromptType.query, **options)[0] - asked.vector).max() < 1e-6
    empty = model.encode(DataLoader(Dataset.from_dict({"text": [" "]})), prompt_type=PromptType.document, **options)
    assert np.isclose(np.linalg.norm(empty[0]), 1.0)


@pytest.mark.slow
def test_mteb_gets_the_model_by_name(encoder: Encoder) -> None:
    register(model_meta("traceir/mini", encoder.fingerprint, source=bundled_model(), route="direct"))
    model = mteb.get_model("traceir/mini")
    assert isinstance(model, EncoderProtocol) and isinstance(model, TraceEncoder)
    assert model.encoder.fingerprint == encoder.fingerprint and model.route == "direct"
    assert model.mteb_model_meta.experiment_kwargs == {"route": "direct"}, "its results are kept apart from those of auto"


def test_ties_and_missing_positives_count_against_us(tmp_path: Path) -> None:
    """Three questions: one right, one whose right answer ties with a copy of it, one without any positive."""
    encoder = Planned(dict(zip(("cube", "ball", "cone"), np.eye(3), strict=True)))
    asked = [asks("2:0", "A red cube.", ["2:0"]), asks("2:1", "A blue ball.", ["2:2"]), asks("2:2", "A green cone.", [])]
    texts = ("A red cube.", "A blue ball.", "A blue ball.", "A green cone.")
    planned_folder(tmp_path, asked, [candidate(f"2:{number}", text) for number, text in enumerate(texts)])
    scores = scores_of(TraceEncoder.of(encoder), mbeir_task(tmp_path, "webqa_task1"))
    assert {(query.instruction, query.target) for query in encoder.asked} == {("Find the text", "text")}
    assert scores["success_at_1"] == pytest.approx(2 / 3), "mteb: the tie goes to the greater id, the positive's"
    assert scores["hit_at_1"] == pytest.approx(1 / 3), "ours: a tie is no hit"
    assert scores["hit_at_5"] == scores["success_at_5"] == pytest.approx(2 / 3), "the query without positives is not left out"
    with pytest.raises(DataError, match="webqa_task1"):
        mbeir_task(tmp_path, "cirr_task7")


@pytest.mark.slow
def test_sentence_transformers_gives_our_vectors(model: TraceModel, tmp_path: Path) -> None:
    """One image and one text in all forms that sentence-transformers knows."""
    shown, file, text = image_of(3, 90, 60), str(tmp_path / "noise.png"), "make one red"
    image = shown.load()
    image.save(file)
    inputs: list[Any] = [text, image, file, {"text": text, "image": image}, {"image": file, "text": text}, {"image": image}]
    alone, both = {"image": shown}, {"text": text, "image": shown}
    known: list[dict[str, Any]] = [{"text": text}, alone, alone, both, both, alone]
    encoder = Encoder(model)
    library = as_sentence_transformer(encoder)
    items = np.stack([encoding.vector for encoding in encoder.encode_items([Item.of(**parts) for parts in known])])
    assert np.abs(library.encode_document(inputs) - items).max() < 1e-6 > np.abs(library.encode(inputs) - items).max()
    assert all(np.abs(library.encode_document(content) - row).max() < 1e-6 for content, row in zip(inputs, items, strict=True))
    queries = [Query.of(**parts, instruction="find the image", target="image") for parts in known]
    for route in ("auto", "reason", "direct"):
        wanted = encoder.encode_queries(queries, route=route)
        options: dict[str, Any] = {"prompt": "find the image", "route": route, "target": "image"}
        ours = library.encode_query(inputs, batch_size=4, **options)
        assert np.abs(ours - [encoding.vector for encoding in wanted]).max() < 1e-6
        reasoning = [encoding.reasoning for encoding in encode_with_reasoning(library, inputs, **options)]
        assert reasoning == [encoding.reasoning for encoding in wanted]
        costs = [
            (int(row["tokens"]), bool(row["reasoned"])) for row in library.encode_query(inputs, output_value=None, **options)
        ]
        assert costs == [(encoding.tokens, encoding.route == "reason") for encoding in wanted]
        assert np.abs(library.similarity(ours, items).numpy() - ours @ items.T).max() < 1e-5
    assert library.get_embedding_dimension() == encoder.width
    nested = TraceModel(model.network, model.processor, replace(model.settings, matryoshka_dims=(48, 16)))
    folder = save(nested, tmp_path / "nested")
    short = as_sentence_transformer(folder, truncate_dim=16)
    assert (short.truncate_dim, short.get_embedding_dimension()) == (16, 16)
    cut = items[:, :16] / np.linalg.norm(items[:, :16], axis=1, keepdims=True)
    assert np.abs(short.encode_document(inputs) - cut).max() < 1e-6
    assert TraceEncoder("traceir/nested", source=folder, embed_dim=16).encoder.width == 16
    with pytest.raises(InputError, match="trained for 48, 16"):
        as_sentence_transformer(folder, truncate_dim=17)
    with pytest.raises(InputError, match="make it with dim"):
        as_sentence_transformer(encoder, truncate_dim=16)


def test_sentence_transformers_is_refused_what_we_cannot_do(model: TraceModel) -> None:
    library = as_sentence_transformer(Encoder(model))
    for content, options, message in (
        ("a red cube", {"prompt": "find it"}, "no instruction"),
        ("a red cube", {"route": "reason"}, "no route"),
        ("a red cube", {"target": "image"}, "no target"),
        ([{"image": np.zeros((4, 4, 3))}], {}, "ndarray"),
        ("http://example.org/cube.png", {}, "address"),
    ):
        with pytest.raises(InputError, match=message):
            library.encode_document(content, **options)
    with pytest.raises(InputError, match="maybe"):
        library.encode_query("a red cube", route="maybe")
    with pytest.raises(InputError, match="no conversations"):
        library.encode_query([[{"role": "user", "content": "a red cube"}]])


@pytest.mark.slow
def test_a_checkpoint_loads_with_the_same_vectors_or_not_at_all(model: TraceModel, tmp_path: Path) -> None:
    """Without modules.json the library would pool the states of a checkpoint in a way of its own, and say nothing."""
    library = as_sentence_transformer(Encoder(model), route="reason", target="image", prompts={"query": "find the image"})
    saved = str(tmp_path / "saved")
    library.save(saved)
    wanted = library.encode_query("make one red")
    (encoding,) = encode_with_reasoning(library, "make one red")
    query = Query.of(text="make one red", instruction="find the image", target="image")
    vectors = [
        encoding.vector,
        as_sentence_transformer(saved).encode_query("make one red"),
        SentenceTransformer(saved, trust_remote_code=True).encode_query("make one red"),
        Encoder.from_pretrained(saved).encode_queries([query], route="reason")[0].vector,  # an ordinary checkpoint too
    ]
    assert encoding.route == "reason" and all(np.abs(vector - wanted).max() < 1e-6 for vector in vectors)
    for folder in (saved, str(bundled_model()), str(save(model, tmp_path / "plain"))):
        with pytest.raises(ValueError, match=r"traceir\.sentence\.TraceModule.*\s.*trust_remote_code"):
            SentenceTransformer(folder)
