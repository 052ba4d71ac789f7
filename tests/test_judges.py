"""The outside judges: sentence-transformers and mteb give the vectors and the hit rates that we give ourselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mteb
import numpy as np
import pytest
from datasets import Dataset
from mteb.models import EncoderProtocol
from mteb.types import PromptType
from PIL import Image
from sentence_transformers import SentenceTransformer
from torch.utils.data import DataLoader

from traceir.checkpoint import bundled_model
from traceir.encoder import Encoder
from traceir.errors import DataError, InputError
from traceir.evaluation.evaluate import evaluate
from traceir.evaluation.judged import read_judged
from traceir.evaluation.mteb_model import KS, TraceEncoder, mbeir_task, model_meta, register
from traceir.images import ImageInput
from traceir.items import Item, Query
from traceir.model import TraceModel, save
from traceir.sentence import as_sentence_transformer, encode_with_reasoning

ROWS = ("cirr_task7", "webqa_task2")
LIMIT = 24
QUIET: dict[str, Any] = {"show_progress_bar": False, "batch_size": 16}


def scores_of(model: TraceEncoder, task: Any) -> dict[str, float]:
    result = mteb.evaluate(model, task, cache=None, show_progress_bar=False, encode_kwargs=dict(QUIET))
    found: dict[str, float] = result.task_results[0].scores["test"][0]
    return found


def test_mteb_counts_the_same_hits(encoder: Encoder, folder: Path, tmp_path: Path) -> None:
    evaluate(encoder, folder, tmp_path / "ours", rows=ROWS, limit=LIMIT, progress=False)
    judged = read_judged(tmp_path / "ours" / "queries-auto.jsonl")
    assert {one.route for one in judged} == {"direct", "reason"}
    rates = []
    for row in ROWS:
        ranks = np.array([one.rank for one in judged if one.row == row])
        assert len(ranks) == LIMIT
        theirs = scores_of(TraceEncoder.of(encoder), mbeir_task(folder, row, limit=LIMIT))
        for k in KS:
            ours = float((ranks <= k).mean())
            assert abs(theirs[f"success_at_{k}"] - ours) < 1e-6, (row, k)
            assert abs(theirs[f"hit_at_{k}"] - ours) < 1e-6, (row, k)
            assert theirs[f"hit_rate_at_{k}"] == round(ours, 5), (row, k)
            rates.append(ours)
        assert theirs["main_score"] == theirs["hit_rate_at_5"]
    assert len(set(rates)) > 3 and 0.0 < min(rates) < 0.7 < max(rates), "rates that a wrong prompt or pool would change"


def test_mteb_lets_only_queries_reason(encoder: Encoder, folder: Path) -> None:
    task = mbeir_task(folder, "cirr_task7", limit=6)
    task.load_data()
    rows = task.dataset["default"]["test"]["queries"]
    loader = DataLoader(rows, batch_size=4, collate_fn=lambda batch: {key: [one[key] for one in batch] for key in batch[0]})
    pictures = [ImageInput.from_pil(one["image"]) for one in rows]
    instruction = task.metadata.prompt["query"]
    queries = [Query.of(text=one["text"], image=shown, instruction=instruction, target="image")
               for one, shown in zip(rows, pictures, strict=True)]  # fmt: skip
    items = [Item.of(text=one["text"], image=shown) for one, shown in zip(rows, pictures, strict=True)]
    reasoned = encoder.encode_queries(queries, route="reason")
    assert all(one.route == "reason" for one in reasoned)
    judge = TraceEncoder.of(encoder, route="reason")

    def vectors(prompt_type: PromptType | None) -> np.ndarray:
        return judge.encode(loader, task_metadata=task.metadata, hf_split="test", hf_subset="default", prompt_type=prompt_type)

    assert np.abs(vectors(PromptType.query) - [one.vector for one in reasoned]).max() < 1e-6
    plain = np.stack([one.vector for one in encoder.encode_items(items)])
    assert np.abs(vectors(PromptType.document) - plain).max() < 1e-6
    assert np.abs(vectors(None) - plain).max() < 1e-6


def test_mteb_gets_the_model_by_name(encoder: Encoder) -> None:
    register(model_meta("traceir/mini", encoder.fingerprint, source=bundled_model(), route="direct"))
    found = mteb.get_model("traceir/mini")
    assert isinstance(found, EncoderProtocol) and isinstance(found, TraceEncoder)
    assert found.encoder.fingerprint == encoder.fingerprint and found.route == "direct"
    assert found.mteb_model_meta.experiment_kwargs == {"route": "direct"}, "its results are kept apart from those of auto"


def write_texts(root: Path) -> Path:
    """A row of three questions: one right, one whose right answer ties with a copy of it, one without any positive."""
    for name in ("query/test", "cand_pool/local", "instructions"):
        (root / name).mkdir(parents=True)
    texts = ["A red cube.", "A blue ball.", "A blue ball.", "A green cone."]
    asked = [("2:0", "A red cube.", ["2:0"]), ("2:1", "A blue ball.", ["2:2"]), ("2:2", "A green cone.", [])]
    queries = [{"qid": qid, "query_txt": text, "query_img_path": None, "query_modality": "text", "pos_cand_list": right,
                "task_id": 1} for qid, text, right in asked]  # fmt: skip
    pool = [{"did": f"2:{number}", "txt": text, "img_path": None, "modality": "text"} for number, text in enumerate(texts)]
    for path, lines in (("query/test/mbeir_webqa_task1_test", queries), ("cand_pool/local/mbeir_webqa_task1_cand_pool", pool)):
        (root / f"{path}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n"
    (root / "instructions" / "query_instructions.tsv").write_text(header + "text\ttext\tWebQA\t2\tFind the same words.\n")
    return root


class Parrot:
    """Vectors by the words alone: equal texts are equal, different ones at right angles; queries and items alike."""

    fingerprint, width = "parrot", 3
    order = ("A red cube.", "A blue ball.", "A green cone.")

    def encode_queries(self, queries: list[Query], **_: Any) -> list[Any]:
        assert all(query.instruction == "Find the same words." and query.target == "text" for query in queries)
        return self.encode_items(queries)

    def encode_items(self, items: list[Any], **_: Any) -> list[Any]:
        rows = np.eye(3, dtype=np.float32)
        return [type("Encoded", (), {"vector": rows[self.order.index(item.text)]}) for item in items]


def test_ties_and_missing_positives_count_against_us(tmp_path: Path) -> None:
    judge = TraceEncoder.of(Encoder.from_pretrained(bundled_model()))
    judge.encoder = Parrot()
    scores = scores_of(judge, mbeir_task(write_texts(tmp_path), "webqa_task1"))
    assert scores["success_at_1"] == pytest.approx(2 / 3), "mteb: the tie goes to the greater id, the positive's"
    assert scores["hit_at_1"] == pytest.approx(1 / 3), "ours: a tie is no hit"
    assert scores["hit_at_5"] == scores["success_at_5"] == pytest.approx(2 / 3), "the query without positives is not left out"
    with pytest.raises(DataError, match="webqa_task1"):
        mbeir_task(tmp_path, "cirr_task7")


def test_mteb_batches_with_their_own_instructions_and_empty_documents(encoder: Encoder, folder: Path) -> None:
    metadata = mbeir_task(folder, "webqa_task1").metadata
    rows = Dataset.from_dict({"text": ["red cube find it"], "query": ["red cube"], "instruction": ["find it"]})
    judge, options = TraceEncoder.of(encoder), {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    found = judge.encode(DataLoader(rows), prompt_type=PromptType.query, **options)
    wanted = encoder.encode_queries([Query.of(text="red cube", instruction="find it", target="text")])
    assert np.abs(found[0] - wanted[0].vector).max() < 1e-6
    empty = judge.encode(DataLoader(Dataset.from_dict({"text": [" "]})), prompt_type=PromptType.document, **options)
    assert np.isclose(np.linalg.norm(empty[0]), 1.0)
    with pytest.raises(InputError, match="audio"):
        judge.encode([{"audio": [1]}], prompt_type=PromptType.document, **options)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One picture and one text in all forms that sentence-transformers knows."""
    drawn = ImageInput.from_pil(_noise()).load()
    file = tmp_path_factory.mktemp("pictures") / "noise.png"
    drawn.save(file)
    return {"text": "make one red", "image": drawn, "path": str(file), "both": {"text": "make one red", "image": drawn},
            "both by path": {"image": str(file), "text": "make one red"}, "image alone": {"image": drawn}}  # fmt: skip


def _noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 90, 3), dtype=np.uint8))


def test_sentence_transformers_gives_our_vectors(model: TraceModel, inputs: dict[str, Any]) -> None:
    encoder = Encoder(model)
    library = as_sentence_transformer(encoder)
    shown = ImageInput.from_pil(inputs["image"])
    text, image, both = {"text": "make one red"}, {"image": shown}, {"text": "make one red", "image": shown}
    known = dict(zip(inputs, (text, image, image, both, both, image), strict=True))
    items = np.stack([one.vector for one in encoder.encode_items([Item.of(**parts) for parts in known.values()])])
    assert np.abs(library.encode_document(list(inputs.values())) - items).max() < 1e-6
    assert np.abs(library.encode(list(inputs.values())) - items).max() < 1e-6
    for name, one in inputs.items():
        assert np.abs(library.encode_document(one) - items[list(inputs).index(name)]).max() < 1e-6, name
    queries = [Query.of(**parts, instruction="find the image", target="image") for parts in known.values()]
    for route in ("auto", "reason", "direct"):
        wanted = encoder.encode_queries(queries, route=route)
        options: dict[str, Any] = {"prompt": "find the image", "route": route, "target": "image"}
        found = library.encode_query(list(inputs.values()), batch_size=4, **options)
        assert np.abs(found - [one.vector for one in wanted]).max() < 1e-6
        told = encode_with_reasoning(library, list(inputs.values()), **options)
        assert [one.reasoning for one in told] == [one.reasoning for one in wanted]
        parts = library.encode_query(list(inputs.values()), output_value=None, **options)
        assert [int(one["tokens"]) for one in parts] == [one.tokens for one in wanted]
        assert [bool(one["reasoned"]) for one in parts] == [one.route == "reason" for one in wanted]
        assert np.abs(library.similarity(found, items).numpy() - found @ items.T).max() < 1e-5
    assert library.get_embedding_dimension() == encoder.width


def test_sentence_transformers_is_refused_what_we_cannot_do(model: TraceModel) -> None:
    library = as_sentence_transformer(Encoder(model))
    for options, message in (
        ({"prompt": "find it"}, "no instruction"), ({"route": "reason"}, "no route"), ({"target": "image"}, "no target")
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            library.encode_document("a red cube", **options)
    with pytest.raises(InputError, match="maybe"):
        library.encode_query("a red cube", route="maybe")
    with pytest.raises(InputError, match="no conversations"):
        library.encode_query([[{"role": "user", "content": "a red cube"}]])
    with pytest.raises(InputError, match="ndarray"):
        library.encode_document([{"image": np.zeros((4, 4, 3))}])
    with pytest.raises(InputError, match="address"):
        library.encode_document("http://example.org/cube.png")


def test_a_saved_sentence_transformer_loads_again(model: TraceModel, tmp_path: Path) -> None:
    library = as_sentence_transformer(Encoder(model), route="reason", target="image", prompts={"query": "find the image"})
    library.save(str(tmp_path / "saved"))
    wanted = library.encode_query("make one red")
    told = encode_with_reasoning(library, "make one red")
    assert told[0].route == "reason" and np.abs(told[0].vector - wanted).max() < 1e-6
    again = as_sentence_transformer(tmp_path / "saved")
    assert np.abs(again.encode_query("make one red") - wanted).max() < 1e-6
    theirs = SentenceTransformer(str(tmp_path / "saved"), trust_remote_code=True)
    assert np.abs(theirs.encode_query("make one red") - wanted).max() < 1e-6
    with pytest.raises(ValueError, match="trust_remote_code"):
        SentenceTransformer(str(tmp_path / "saved"))
    ours = Encoder.from_pretrained(tmp_path / "saved")
    asked = ours.encode_queries([Query.of(text="make one red", instruction="find the image", target="image")], route="reason")
    assert np.abs(asked[0].vector - wanted).max() < 1e-6, "the folder is an ordinary checkpoint too"


def test_field_report_12_a_checkpoint_of_ours_is_never_read_as_another_kind_of_model(
    model: TraceModel, encoder: Encoder, tmp_path: Path
) -> None:
    """Without modules.json the library would pool the states of the checkpoint in a way of its own, and say nothing."""
    for folder in (bundled_model(), save(model, tmp_path / "saved")):
        with pytest.raises(ValueError, match=r"traceir\.sentence\.TraceModule.*\s.*trust_remote_code"):
            SentenceTransformer(str(folder))
    loaded = SentenceTransformer(str(bundled_model()), trust_remote_code=True)
    text = "On the left a red cube, in the middle a blue ring, on the right a green ball."
    np.testing.assert_allclose(loaded.encode_document([text])[0], encoder.encode_items([Item.of(text=text)])[0].vector, atol=1e-5)
