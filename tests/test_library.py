"""Published models of every kind: the vectors of sentence-transformers itself, by whichever interface they are asked for."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import published
import pytest
import torch
from fake_sglang import serving_here
from fakes import FakeEncoder
from PIL import Image
from sentence_transformers import SentenceTransformer
from train_folder import query, write_lines
from transformers import AutoProcessor, Siglip2Model

import traceir
from traceir import Encoder, Item, Query, load_encoder, open_index
from traceir.checkpoint import bundled_model, is_library
from traceir.cli import index_verbs
from traceir.cli.main import build_parser, main
from traceir.errors import InputError, ModelError
from traceir.images import ImageInput
from traceir.items import Encoding, Vector
from traceir.library import LibraryEncoder
from traceir.serve.jobs import FAILURES, UnavailableError
from traceir.serve.scheduler import Scheduler

TEXT = "a red cube on the left"
LONG = "a green ball and a red cube on the left of the table"
ASKED = "Find a picture of the same thing."


def run(*arguments: object) -> int:
    return main(list(map(str, arguments)))


def pixels(seed: int) -> Image.Image:
    draw = np.random.default_rng(seed)
    width, height = (int(side) for side in draw.integers(33, 70, 2))
    return Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))


def far(actual: Any, wanted: Any) -> float:
    """The greatest difference between two lists of vectors."""
    return float(np.abs(np.asarray(actual, dtype=np.float64) - np.asarray(wanted, dtype=np.float64)).max())


def vectors(encodings: Sequence[Encoding]) -> Vector:
    return np.stack([encoding.vector for encoding in encodings])


def queries_of(model: SentenceTransformer, inputs: Sequence[Any], **options: Any) -> Vector:
    return np.asarray(model.encode_query(list(inputs), normalize_embeddings=True, **options))


def documents_of(model: SentenceTransformer, inputs: Sequence[Any]) -> Vector:
    return np.asarray(model.encode_document(list(inputs), normalize_embeddings=True))


def both_of(folder: Path, **options: Any) -> tuple[LibraryEncoder, SentenceTransformer]:
    """Our encoder and the library's own model of a folder."""
    encoder = load_encoder(folder, **options)
    assert isinstance(encoder, LibraryEncoder)
    return encoder, SentenceTransformer(str(folder))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each kind."""
    root = tmp_path_factory.mktemp("published")
    published.save_clip(root / "clip")
    published.save_old_clip(root / "old-clip")
    published.save_siglip(root / "siglip-bare")
    published.save_qwen(root / "qwen")
    published.save_bert(root / "bert")
    published.save_gemma(root / "gemma")
    bare = published.Transformer(
        str(root / "siglip-bare"), processing_kwargs={"text": {"padding": "max_length", "max_length": 64, "truncation": True}}
    )
    SentenceTransformer(modules=[bare]).save_pretrained(str(root / "siglip"))
    return root


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """A folder of images and texts."""
    root = tmp_path / "things"
    root.mkdir()
    for number in range(4):
        pixels(number).save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(" ".join(published.WORDS[number : number + 4]))
    return root


IMAGES = ("clip", "old-clip", "siglip", "qwen")
EVERY = (*IMAGES, "bert", "gemma")


@pytest.mark.parametrize("kind", ("clip", *(pytest.param(kind, marks=pytest.mark.slow) for kind in EVERY[1:])))
def test_the_command_line_gives_the_library_s_vectors(
    kind: str, models: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, index = SentenceTransformer(str(models / kind)), tmp_path / "index"
    code = run("index", "add", gallery, "--index", index, "--model", models / kind)
    out, err = capsys.readouterr()
    inputs: dict[str, Any] = {f"{number}.txt": (gallery / f"{number}.txt").read_text() for number in range(4)}
    if kind in IMAGES:
        inputs |= {f"{number}.png": Image.open(gallery / f"{number}.png").convert("RGB") for number in range(4)}
        assert code == 0 and "added 8" in out
    else:
        assert code == 1 and "added 4" in out and err.count("is an image, which") == 4
    # One by one: the library makes other vectors of texts and images in one list.
    wanted = np.concatenate([documents_of(own, [value]) for value in inputs.values()])
    with open_index(index) as opened:
        stored = opened.get(list(inputs), with_vectors=True)
    assert far([stored[name].vector for name in inputs], wanted) < 1e-6
    assert run("search", TEXT, "--index", index, "--model", models / kind, "--json", "-k", 8) == 0
    scores = {hit["id"]: hit["score"] for hit in json.loads(capsys.readouterr().out)["hits"]}
    assert far([scores[name] for name in inputs], wanted @ queries_of(own, [TEXT])[0]) < 1e-5


@pytest.mark.parametrize("kind", ("clip", pytest.param("gemma", marks=pytest.mark.slow)))
def test_the_server_gives_the_library_s_vectors(kind: str, models: Path, gallery: Path, tmp_path: Path) -> None:
    encoder, own = both_of(models / kind)
    run("index", "add", gallery, "--index", tmp_path / "index", "--model", models / kind)
    with serving_here(tmp_path / "index", encoder) as url, httpx.Client(base_url=url) as client:
        answer = client.post("/v1/embeddings", json={"input": [TEXT, LONG], "model": "traceir"}).json()
        assert far([entry["embedding"] for entry in answer["data"]], documents_of(own, [TEXT, LONG])) < 1e-6
        hits = client.post("/search", json={"text": TEXT, "k": 4, "modality": "text"}).json()["hits"]
        texts = [(gallery / hit["id"]).read_text() for hit in hits]
        assert far([hit["score"] for hit in hits], documents_of(own, texts) @ queries_of(own, [TEXT])[0]) < 1e-5
        refused = client.post("/search", json={"text": TEXT, "route": "reason"})
        assert refused.status_code == 400 and "cannot reason" in refused.text


ROW = "fashioniq_task7"


@pytest.fixture(scope="module")
def row_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A row of edits in M-BEIR's layout, and its texts in M-BEIR's form, which evaluation gives."""
    root = tmp_path_factory.mktemp("mbeir")
    (root / "mbeir_images").mkdir()
    images = [f"mbeir_images/{number}.png" for number in range(6)]
    for number, image in enumerate(images):
        pixels(number).save(root / image)
    texts = [" ".join(published.WORDS[n : n + 4]).capitalize() + "." for n in range(3)]
    edits = [query(f"7:{n}", 7, images[n], text, [f"7:{n}"], []) for n, text in enumerate(texts)]
    pool = [{"did": f"7:{n}", "txt": None, "img_path": image, "modality": "image"} for n, image in enumerate(images)]
    write_lines(root / f"query/test/mbeir_{ROW}_test.jsonl", edits)
    write_lines(root / f"cand_pool/local/mbeir_{ROW}_cand_pool.jsonl", pool)
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\nimage,text\timage\tFashionIQ\t7\tChange it.\n"
    )
    return root


def test_evaluation_ranks_by_the_library_s_vectors(row_folder: Path, models: Path, tmp_path: Path) -> None:
    assert run("evaluate", "--data", row_folder, "--out", tmp_path, "--rows", ROW, "--model", models / "qwen") == 0
    own = SentenceTransformer(str(models / "qwen"))
    asked = [json.loads(line) for line in (row_folder / f"query/test/mbeir_{ROW}_test.jsonl").read_text().splitlines()]
    wanted = documents_of(own, [Image.open(row_folder / f"mbeir_images/{number}.png") for number in range(6)])
    inputs = [{"image": Image.open(row_folder / query["query_img_path"]), "text": query["query_txt"]} for query in asked]
    lines = [line.split() for line in (tmp_path / "runs" / f"{ROW}-auto.txt").read_text().splitlines()]
    ranked = {(qid, did): float(score) for qid, _, did, _, score, *_ in lines}
    scores = [[ranked[f"7:{row}", f"7:{number}"] for number in range(6)] for row in range(3)]
    assert far(scores, queries_of(own, inputs, prompt="Change it.") @ wanted.T) < 2e-6
    about = json.loads((tmp_path / "results.json").read_text())
    assert about["model"] == load_encoder(models / "qwen").fingerprint and about["prompt_version"] == "library-1"
    assert about["max_reasoning_tokens"] is None and ROW in about["routes"]["auto"]


def test_the_zero_shot_columns_are_ranked_by_the_library_s_vectors(models: Path, tmp_path: Path) -> None:
    files = {number: tmp_path / "sets" / "Urban1k" / "image" / f"{number}.jpg" for number in (1, 2, 10)}
    for number, file in files.items():
        caption = tmp_path / f"sets/Urban1k/caption/{number}.txt"
        for folder in (file.parent, caption.parent):
            folder.mkdir(parents=True, exist_ok=True)
        caption.write_text(f"Street {number}.\nA second line.\n")
        pixels(number).save(file)
    assert run("unseen", "--data", tmp_path / "sets", "--out", tmp_path / "out", "--model", models / "clip") == 0
    own = SentenceTransformer(str(models / "clip"))
    captions = queries_of(own, [f"Street {number}." for number in files])
    scores = captions @ documents_of(own, [Image.open(file) for file in files.values()]).T
    ranks = [int((row >= row[index]).sum()) for index, row in enumerate(scores)]
    outcomes = [json.loads(line) for line in (tmp_path / "out" / "outcomes-auto.jsonl").read_text().splitlines()]
    assert [outcome["rank"] for outcome in outcomes if outcome["task"] == "urban1k_t2i"] == ranks


def test_a_route_and_verbs_that_look_into_a_model_are_refused_in_one_line(
    row_folder: Path, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip = models / "clip"
    for line, message in (
        (("evaluate", "--data", row_folder, "--out", tmp_path, "--route", "auto,reason", "--model", clip), "cannot reason"),
        (("explain", "--text", "a", "--model", clip), "nothing but vectors"),
        (("faithfulness", "--data", row_folder, "--out", tmp_path, "--model", clip), "nothing but vectors"),
        (("merge", f"st:{clip}", "--out", tmp_path / "merged"), "is a model of sentence-transformers"),
        (("search", "a", "--index", tmp_path / "no", "--model", clip, "--profile", "gme"), "no index"),
        (("index", "add", row_folder, "--index", tmp_path / "i", "--model", clip, "--profile", "gme"), "leave out the profile"),
        (("index", "add", row_folder, "--index", tmp_path / "i", "--model", f"st:{tmp_path / 'none'}"), "there is no folder"),
    ):
        assert run(*line) == 2
        assert message in _error(capsys)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "i").exists()


def _error(capsys: pytest.CaptureFixture[str]) -> str:
    """What follows "error:", the only line of its kind and the last; progress of transformers may stand before it."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert [line for line in lines if line.startswith("traceir: ")] == lines[-1:]
    return lines[-1].removeprefix("traceir: error: ")


def test_a_bare_checkpoint_is_asked_for_by_its_prefix(models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bare = published.save_bare_clip(tmp_path / "bare")
    assert not is_library(str(bare)) and is_library(f"st:{bare}")
    with pytest.raises(ModelError, match="'clip' checkpoint"):
        load_encoder(bare)
    encoder = load_encoder(f"st:{bare}")
    assert not caplog.records
    plain = load_encoder(f"st:{models / 'bert-bare'}")
    assert far(vectors(plain.encode_items([Item.of(text=TEXT)])), documents_of(plain.model, [TEXT])) < 1e-6
    assert [record.getMessage() for record in caplog.records if record.name == "traceir.library"] == [
        f"{models / 'bert-bare'} has no modules.json: it is pooled by the library's default, not as its publisher may have meant"
    ]
    assert far(vectors(encoder.encode_queries([Query.of(text=TEXT)])), queries_of(SentenceTransformer(str(bare)), [TEXT])) < 1e-6


def test_texts_of_a_bare_siglip_are_padded_as_it_was_trained(models: Path) -> None:
    """By the library's default the last position read is the last of the longest text in the batch."""
    folder = models / "siglip-bare"
    encoder, own = load_encoder(f"st:{folder}"), SentenceTransformer(str(folder))
    processor, network = AutoProcessor.from_pretrained(folder), Siglip2Model.from_pretrained(folder).eval()
    read = processor(text=[TEXT, LONG], padding="max_length", max_length=64, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        wanted = torch.nn.functional.normalize(network.get_text_features(input_ids=read["input_ids"]).pooler_output, dim=-1)
    asked = [Query.of(text=TEXT), Query.of(text=LONG)]
    assert far(vectors(encoder.encode_queries(asked)), wanted) < 1e-6
    assert far(vectors(encoder.encode_queries(asked[:1])), wanted[:1]) < 1e-6
    assert far(queries_of(own, [TEXT, LONG])[:1], queries_of(own, [TEXT])) > 0.01


def test_a_relative_path_behind_the_prefix_means_the_same_on_a_worker(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models)
    for name, meant in (("st:bert", f"st:{models / 'bert'}"), ("bert", str(models / "bert")), ("st:a/b", "st:a/b")):
        args = build_parser().parse_args(["index", "add", "x", "--index", "i", "--model", name, "--dim", "8"])
        args.threads, args.verbose = None, False
        described = index_verbs.encoder_anywhere(args)
        assert (described.model, described.dim, described.engine) == (meant, 8, None)


def test_instructions_go_where_the_model_has_a_place_for_them(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = [Query.of(text=TEXT, instruction=ASKED), Query.of(text=LONG, instruction=ASKED), Query.of(text=TEXT)]
    qwen, own = both_of(models / "qwen")
    actual = vectors(qwen.encode_queries(asked))
    assert far(actual[:2], queries_of(own, [TEXT, LONG], prompt=ASKED)) < 1e-6
    assert far(actual[2:], queries_of(own, [TEXT])) < 1e-6 and far(actual[0], actual[2]) > 1e-3

    prompts = {"web_search": "Instruct: Given a question, find passages.\nQuery:"}
    folder = published.save_bert(tmp_path / "e5", prompts=prompts)
    e5, own = both_of(folder)
    actual = vectors(e5.encode_queries(asked))
    assert far(actual[:2], queries_of(own, [TEXT, LONG], prompt=f"Instruct: {ASKED}\nQuery:")) < 1e-6
    assert far(actual[2:], queries_of(own, [TEXT])) < 1e-6
    assert not caplog.records

    gemma, own = both_of(models / "gemma")
    with caplog.at_level(logging.WARNING):
        actual = vectors(gemma.encode_queries(asked))
        gemma.encode_queries(asked)
    assert far(actual, queries_of(own, [TEXT, LONG, TEXT])) < 1e-6
    assert [record.getMessage() for record in caplog.records if "left out" in record.getMessage()] == [
        "gemma has no place for an instruction: the instructions of queries are left out"
    ]
    alone = gemma.encode_queries([Query(instruction="a red cube")])
    assert far(vectors(alone), queries_of(own, ["a red cube"])) < 1e-6


def test_parts_are_read_in_their_order(models: Path) -> None:
    qwen, own = both_of(models / "qwen")
    first, second = pixels(1), pixels(2)
    left, other = ImageInput.from_pil(first), ImageInput.from_pil(second)
    pairs = [
        (Item((left, "a red cube")), {"image": first, "text": "a red cube"}),
        (Item(("a red cube", left)), {"text": "a red cube", "image": first}),
        (Item(("a", "red cube")), "a red cube"),
        (Item((left, "and", other)), _message("image", first, "text", "and", "image", second)),
        (Item((other, left)), _message("image", second, "image", first)),
    ]
    actual = vectors(qwen.encode_items([item for item, _ in pairs]))
    wanted = np.stack([documents_of(own, [inputs])[0] for _, inputs in pairs])
    assert far(actual, wanted) < 1e-6
    assert far(actual[0], actual[1]) > 1e-3


def _message(*parts: Any) -> list[dict[str, Any]]:
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user", "content": [{"type": kind, kind: value} for kind, value in pairs]}]


def test_weights_may_be_in_bfloat16_and_threads_share_one_encoder(models: Path) -> None:
    encoder = load_encoder(models / "bert", dtype=torch.bfloat16)
    own = SentenceTransformer(str(models / "bert"), model_kwargs={"dtype": torch.bfloat16})
    texts = [" ".join(published.WORDS[: 2 + n % 9]) + f" {n}" for n in range(24)]
    with ThreadPoolExecutor(4) as pool:
        actual = vectors(list(pool.map(lambda text: encoder.encode_queries([Query.of(text=text)])[0], texts)))
    assert encoder.vector_settings["dtype"] == "torch.bfloat16" and actual.dtype == np.float32
    assert far(actual, [queries_of(own, [text])[0] for text in texts]) < 1e-6


def test_modalities_that_a_model_lacks_are_refused_in_words(models: Path) -> None:
    clip, bert = load_encoder(models / "clip"), load_encoder(models / "bert")
    shot = ImageInput.from_pil(pixels(0))
    with pytest.raises(InputError, match=r"item both is an image and a text together, which .* give it a text, an image, or"):
        clip.encode_items([Item.of(text="a"), Item.of(text="a", image=shot, id="both")])
    with pytest.raises(InputError, match=r"query \(no id\) is several parts"):
        clip.encode_queries([Query((shot, shot))])
    with pytest.raises(InputError, match=r"item shot is an image, which .* cannot encode; give it a text, or use another model"):
        bert.encode_items([Item.of(image=shot, id="shot")])
    with pytest.raises(InputError, match="cannot reason; use route direct or auto"):
        clip.encode_queries([Query.of(text="a")], route="reason")
    with pytest.raises(InputError, match="route 'fast' is unknown"):
        clip.encode_queries([Query.of(text="a")], route="fast")


def test_a_text_is_never_opened_as_a_file_or_an_address(models: Path, tmp_path: Path) -> None:
    """The library takes a str that ends like an image for one, and would read or fetch it."""
    pixels(0).save(tmp_path / "secret.png")
    texts = [str(tmp_path / "secret.png"), "http://127.0.0.1:9/a.png", "data:image/png;base64,AAAA", "https://youtu.be/x"]
    for kind in ("clip", "qwen"):
        encoder, own = both_of(models / kind)
        actual = vectors(encoder.encode_items([Item.of(text=text) for text in texts]))
        assert far(actual, documents_of(own, [{"text": text} for text in texts])) < 1e-6
        assert far(vectors(encoder.encode_queries([Query.of(text=texts[0])])), queries_of(own, [{"text": texts[0]}])) < 1e-6


def test_a_text_that_is_cut_is_told(models: Path) -> None:
    long = " ".join(published.WORDS * 6)
    own = SentenceTransformer(str(models / "clip"))
    (short, cut) = load_encoder(models / "clip").encode_items([Item.of(text="a red cube"), Item.of(text=long)])
    assert (short.cut, cut.text_limit) == (0, 20)
    assert cut.cut == len(own.tokenizer(long, truncation=False)["input_ids"]) - 20


def test_truncated_vectors_are_the_library_s_and_another_index(
    models: Path, gallery: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gemma, index = models / "gemma", tmp_path / "index"
    whole, short = load_encoder(gemma), load_encoder(gemma, dim=8)
    own = SentenceTransformer(str(gemma), truncate_dim=8)
    actual = vectors(short.encode_queries([Query.of(text=TEXT)]))
    assert short.width == 8 and actual.shape == (1, 8)
    assert far(actual, queries_of(own, [TEXT])) < 1e-6 and abs(np.linalg.norm(actual) - 1) < 1e-6
    assert (whole.fingerprint, load_encoder(gemma, dim=32).prompt_version) == (short.fingerprint, whole.prompt_version)
    texts = sorted(gallery.glob("*.txt"))
    assert run("index", "add", *texts, "--index", index, "--model", gemma, "--dim", 8) == 0
    assert run("search", TEXT, "--index", index, "--model", gemma, "--dim", 8) == 0
    capsys.readouterr()
    for arguments, message in (
        ((), "width 8, not 32; use the same encoder, at this width (--dim 8)"),
        (("--dim", 16), "width 8, not 16"),
        (("--dim", 64), "have 32 components and cannot be truncated to 64"),
    ):
        assert run("search", TEXT, "--index", index, "--model", gemma, *arguments) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(InputError, match=r"have 128 components and cannot be cut to 8: its traceir\.json names no"):
        load_encoder(dim=8)


def test_the_fingerprint_is_of_all_that_decides_a_vector(models: Path, tmp_path: Path) -> None:
    first = load_encoder(models / "bert").fingerprint
    moved = shutil.copytree(models / "bert", tmp_path / "moved")
    (moved / "README.md").write_text("another card")
    (moved / "optimizer.pt").write_bytes(b"left by a training")
    (moved / "2_Normalize" / "notes.json").write_text("{}")
    assert load_encoder(moved).fingerprint == first
    pooled = published.save_bert(tmp_path / "pooled", pooling="cls")
    assert (pooled / "model.safetensors").read_bytes() == (models / "bert" / "model.safetensors").read_bytes()
    prompted = published.save_bert(tmp_path / "prompted", prompts={"query": "query: "})
    other = published.save_clip(tmp_path / "other", seed=1)
    fingerprints = [load_encoder(path).fingerprint for path in (pooled, prompted, other, models / "clip", models / "old-clip")]
    assert len({first, *fingerprints}) == 6
    dense = shutil.copytree(models / "gemma", tmp_path / "dense")
    weights = dense / "2_Dense" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + bytes(4))
    assert load_encoder(dense).fingerprint != load_encoder(models / "gemma").fingerprint


def _bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


FOREIGN = {"model_type": "own", "auto_map": {"AutoConfig": "x.Config", "AutoModel": "x.Model"}}
ABOUT = "config_sentence_transformers.json"


@pytest.mark.parametrize(
    ("kind", "spoil", "message"),
    [
        ("gemma", lambda at: _bin(at / "2_Dense"), r"2_Dense holds no model.safetensors, only pytorch_model.bin. TraceIR reads"),
        ("old-clip", lambda at: _bin(at / "0_CLIPModel"), "holds no safetensors weights, model.safetensors, only pytorch_model"),
        (
            "bert",
            lambda at: _edit(at / "modules.json", 0, type="my.Kind"),
            r"of its own \(my.Kind in modules.json\), and TraceIR",
        ),
        ("bert", lambda at: _edit(at / "config.json", None, **FOREIGN), "code that comes with it, and TraceIR runs none"),
        ("bert", lambda at: _edit(at / "modules.json", 1, path="../x/1_Pooling"), "'../x/1_Pooling', which is not below its own"),
        ("bert", lambda at: _edit(at / ABOUT, None, model_type="CrossEncoder"), "is a CrossEncoder, which makes no vectors"),
        ("bert", lambda at: (at / "modules.json").write_text("{"), r"cannot read .*modules.json"),
    ],
)
def test_pickles_and_code_that_comes_with_a_model_are_refused(
    kind: str, spoil: Callable[[Path], object], message: str, models: Path, tmp_path: Path
) -> None:
    spoil(spoilt := shutil.copytree(models / kind, tmp_path / "spoilt"))
    with pytest.raises(ModelError, match=message):
        load_encoder(spoilt)


def _edit(file: Path, row: int | None, **changed: Any) -> None:
    content = json.loads(file.read_text())
    (content if row is None else content[row]).update(changed)
    file.write_text(json.dumps(content))


def test_checkpoints_of_traceir_keep_to_their_own_encoder(tmp_path: Path, models: Path) -> None:
    assert not is_library(str(bundled_model()))
    assert isinstance(load_encoder(), Encoder) and isinstance(traceir.load_encoder(models / "bert"), LibraryEncoder)
    with pytest.raises(ModelError, match=r"load it with traceir.load_encoder\('"):
        Encoder.from_pretrained(models / "bert")
    with pytest.raises(ModelError, match="is a checkpoint of TraceIR itself; leave out st:"):
        load_encoder(f"st:{bundled_model()}")


def test_a_hub_id_is_decided_by_its_modules_file_and_offline_by_the_cache(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    revision = "0123456789012345678901234567890123456789"
    repository = cache / "models--someone--clip"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(models / "old-clip", repository / "snapshots" / revision)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("huggingface_hub.file_download", "huggingface_hub._snapshot_download", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{name}.HF_HUB_CACHE", str(cache), raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    assert is_library("someone/clip") and not is_library("someone/else")
    assert load_encoder("someone/clip").fingerprint == load_encoder(models / "old-clip").fingerprint
    for name in ("someone/else", "st:someone/else"):
        assert run("index", "add", models / "bert", "--index", tmp_path / "index", "--model", name) == 2
        assert _error(capsys).startswith("someone/else is no folder here and not in the local cache")


class _Hub(BaseHTTPRequestHandler):
    """Of a hub, the modules.json of two repositories: one has it, one has none; a third cannot be told."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        body = json.dumps([{"type": "sentence_transformers.models.Transformer", "path": ""}]).encode()
        self.asked.append(self.path)
        missing, broken = "/plain/" in self.path, "/broken/" in self.path
        self.send_response(404 if missing else 403 if broken else 200)
        headers = {"X-Repo-Commit": "0" * 40, "ETag": '"0123"', "Content-Length": str(len(body))}
        for name, value in (headers | ({"X-Error-Code": "EntryNotFound"} if missing else {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_the_hub_is_asked_for_one_file_to_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        pattern = address + "/{repo_id}/resolve/{revision}/{filename}"
        values = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": pattern, "HF_HUB_CACHE": str(tmp_path)}
        for name, value in (values | {"HF_HUB_OFFLINE": False}).items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        assert is_library("someone/model") and not is_library("someone/plain")
        with pytest.raises(ModelError, match="someone/broken cannot be had from the hub: "):
            is_library("someone/broken")
        asked = len(_Hub.asked)
        assert is_library("someone/model") and len(_Hub.asked) == asked  # the cache knows it now
        assert {path.rsplit("/", 1)[-1] for path in _Hub.asked if "resolve" in path} == {"modules.json"}
        hub.shutdown()


# The worker for encoders that cannot be looked into


class Watched(FakeEncoder):
    """Remembers its batches, waits until it may go on, and fails at what it is told to."""

    batch_rows = 4

    def __init__(self, *, broken: Exception | None = None, in_flight: int = 1) -> None:
        super().__init__(8)
        self.broken, self.in_flight, self.closed = broken, in_flight, False
        self.batches: list[list[Any]] = []
        self.going = threading.Event()

    def encode_queries(self, queries: Sequence[Query], *, route: str = "auto") -> list[Encoding]:
        if route == "reason":
            raise InputError("it cannot reason")
        self._wait(queries)
        return super().encode_queries(queries)

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        self._wait(items)
        return super().encode_items(items)

    def _wait(self, contents: Sequence[Query | Item]) -> None:
        self.batches.append(list(contents))
        self.going.wait(10)
        if self.broken is not None:
            raise self.broken

    def close(self) -> None:
        self.closed = True


@asynccontextmanager
async def scheduling(encoder: Watched) -> AsyncIterator[Scheduler]:
    async with asyncio.timeout(30):
        scheduler = Scheduler(encoder)
        scheduler.start()
        try:
            yield scheduler
        finally:
            encoder.going.set()
            await scheduler.close()


def test_what_waits_is_encoded_together_queries_apart_from_items() -> None:
    items, asked = [Item.of(text=f"i{n}") for n in range(20)], [Query.of(text=f"q{n}") for n in range(3)]

    async def work() -> None:
        encoder = Watched(in_flight=3)
        async with scheduling(encoder) as scheduler:
            work = [*map(scheduler.encode_item, items), *(scheduler.encode_query(query, "auto") for query in asked)]
            waiting = asyncio.gather(*work)
            await asyncio.sleep(0.1)
            assert len(encoder.batches) == 3, "as many batches are under way as the encoder takes"
            encoder.going.set()
            served, fake = await waiting, FakeEncoder(8)
            wanted = [*fake.encode_items(items), *fake.encode_queries(asked)]
            assert far(vectors([own.encoding for own in served]), vectors(wanted)) == 0
            assert sum(map(len, encoder.batches)) == 23 and max(map(len, encoder.batches)) == 4 and len(encoder.batches) < 10
            assert all(len(set(map(type, batch))) == 1 for batch in encoder.batches)
            with pytest.raises(InputError, match="cannot reason"):
                await scheduler.encode_query(Query.of(text="a"), "reason")
        assert encoder.closed

    asyncio.run(work())


def test_only_the_input_at_fault_fails_and_one_nobody_waits_for_is_left_out() -> None:
    bad, left = Item.of(text="bad", image=ImageInput.from_bytes(b"no picture")), Item.of(text="left")

    async def work() -> None:
        encoder = Watched()
        async with scheduling(encoder) as scheduler:
            first = asyncio.ensure_future(scheduler.encode_item(Item.of(text="first")))
            await asyncio.sleep(0.05)
            nobody = asyncio.ensure_future(scheduler.encode_item(left))
            items = (Item.of(text="a"), bad, Item.of(text="b"))
            others = asyncio.gather(*map(scheduler.encode_item, items), return_exceptions=True)
            await asyncio.sleep(0.1)
            nobody.cancel()
            await asyncio.sleep(0)
            encoder.going.set()
            assert [type(answer).__name__ for answer in await others] == ["Served", "ImageError", "Served"] and (await first)
            assert not any(left in batch for batch in encoder.batches) and scheduler.alive

    asyncio.run(work())


@pytest.mark.parametrize("error", [ModelError("out of reach"), RuntimeError("out of memory")])
def test_a_failing_encoder_is_unavailable_and_its_server_not_ready(error: Exception) -> None:
    async def work() -> None:
        encoder = Watched(broken=error)
        encoder.going.set()
        async with scheduling(encoder) as scheduler:
            for number in range(FAILURES):
                assert scheduler.alive
                with pytest.raises(UnavailableError, match="out of"):
                    await scheduler.encode_item(Item.of(text=f"i{number}"))
            assert not scheduler.alive
            encoder.broken = None
            await scheduler.encode_item(Item.of(text="again"))
            assert scheduler.alive

    asyncio.run(work())
