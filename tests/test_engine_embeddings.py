"""The encoder over endpoints of embeddings: against a strict stand-in of each kind, our own server, and faults of every sort."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import fake_embeddings as fakes
import numpy as np
import pytest
from conftest import image_of
from fake_embeddings import MODEL, WIDTH, FakeEndpoint
from fake_sglang import served, serving_here
from PIL import Image
from starlette.responses import JSONResponse, Response

from traceir.cli.main import main
from traceir.encoder import Encoder
from traceir.engines.embeddings import EmbeddingsEncoder, upright_url
from traceir.engines.forms import FORMS, form_for, split_engine
from traceir.errors import ImageError, InputError, ModelError
from traceir.images import ImageInput
from traceir.index import open_index
from traceir.items import Encoding, Item, Query
from traceir.retrieval.search import Searcher

KINDS = {
    "openai": FakeEndpoint(fakes.read_tei),
    "vllm": FakeEndpoint(fakes.read_vllm),
    "qwen3-vl": FakeEndpoint(fakes.read_vllm),
    "clip": FakeEndpoint(fakes.read_clip_behind_vllm),
    "siglip": FakeEndpoint(fakes.read_clip_behind_vllm),
    "infinity": FakeEndpoint(fakes.read_infinity, paths=("/embeddings",)),
    "objects": FakeEndpoint(fakes.read_sglang),
    "jina": FakeEndpoint(fakes.read_jina),
}
WORDS = "a red cup beside a green cup"
TEXT, PAIR = [Item.of(text=WORDS)], Item.of(text="a cup", image=image_of(1))


@pytest.fixture(scope="module")
def addresses() -> Iterator[dict[str, str]]:
    """A server of each kind, at these addresses."""
    with ExitStack() as stack:
        yield {kind: stack.enter_context(served(server.app())) for kind, server in KINDS.items()}


@pytest.fixture(scope="module")
def texts(addresses: dict[str, str]) -> Iterator[EmbeddingsEncoder]:
    KINDS["openai"].reset()
    with make(addresses, "openai") as encoder:
        yield encoder


@pytest.fixture(autouse=True)
def fresh() -> None:
    for server in KINDS.values():
        server.reset()


def make(addresses: dict[str, str], form: str, **options: Any) -> EmbeddingsEncoder:
    return EmbeddingsEncoder(addresses[form], MODEL, form, **{"pause_s": 0.01, "tries": 3, "api_key": "secret", **options})


def unit(vector: Any) -> Any:
    return vector / np.linalg.norm(vector)


def vectors(encodings: list[Encoding]) -> Any:
    return np.stack([encoding.vector for encoding in encodings])


# Each kind of server


@pytest.mark.parametrize("form", FORMS)
def test_texts_and_images_of_each_kind_in_order(addresses: dict[str, str], form: str) -> None:
    server, images = KINDS[form], [] if form == "openai" else [image_of(seed) for seed in range(10)]
    items = [Item.of(text=f"{WORDS} {number}") for number in range(36)]
    for index, image in enumerate(images):
        items.insert(3 * index, Item.of(image=image))
    with make(addresses, form) as encoder:
        started = len(server.bodies)
        encodings = encoder.encode_items(items)
        asked = encoder.encode_queries([Query.of(text=WORDS)])
        assert encoder.tokens > 36 * 8
    assert encoder.width == WIDTH and encoder.prompt_version == f"{form}-1"
    prefix = "Represent the user's input. " if form == "qwen3-vl" else ""
    alone = prefix + ("padding" if form == "objects" else "")
    wanted = [server.vector(prefix + own.text, None) if own.text else server.vector(alone, own.images[0].load()) for own in items]
    assert vectors(encodings) == pytest.approx(np.stack([unit(vector) for vector in wanted]), abs=1e-6)
    assert asked[0].vector == pytest.approx(unit(server.vector(prefix + WORDS, None)), abs=1e-6)
    assert {(own.route, own.reasoning, own.tokens, own.truncated) for own in encodings} == {("direct", "", 0, False)}
    assert server.keys == {"Bearer secret"}
    sizes = [len(body["input"]) if "input" in body else 1 for body in server.bodies[started:]]
    assert max(sizes) == (1 if form in ("vllm", "qwen3-vl") else 32) and sum(sizes) == len(items) + 1


def test_pairs_and_instructions_go_where_each_kind_has_place_for_them(addresses: dict[str, str]) -> None:
    asked = Query.of(text="a cup", image=image_of(1), instruction="find it in green")
    bodies: dict[str, tuple[Any, Any]] = {}
    for form in ("vllm", "qwen3-vl", "objects"):
        with make(addresses, form) as encoder:
            encoder.encode_items([PAIR])
            encoder.encode_queries([asked])
        bodies[form] = tuple(KINDS[form].bodies[-2:])
    first, second = bodies["objects"]
    assert first["input"][0]["text"] == "a cup" and first["input_type"] == "document"
    assert second["input"][0]["text"] == "find it in green a cup" and second["input_type"] == "query"
    assert second["input"][0]["image"].startswith("data:image/png;base64,")
    for form, end in (("vllm", ""), ("qwen3-vl", ".")):
        first, second = bodies[form]
        assert [part["type"] for part in first["messages"][form == "qwen3-vl"]["content"]] == ["image_url", "text"]
        assert second["messages"][0] == {"role": "system", "content": [{"type": "text", "text": f"find it in green{end}"}]}
        assert ("continue_final_message" in second) == ("add_special_tokens" in second) == (form == "qwen3-vl")
    assert [message["role"] for message in bodies["vllm"][0]["messages"]] == ["user"]
    messages = bodies["qwen3-vl"][0]["messages"]
    assert messages[0]["content"][0]["text"] == "Represent the user's input."
    assert messages[2] == {"role": "assistant", "content": [{"type": "text", "text": ""}]}
    with make(addresses, "siglip") as encoder:
        encoder.encode_items([Item.of(text="a cup"), Item.of(image=image_of(1))])
    sent = KINDS["siglip"].bodies[-2:]
    assert sorted(("messages" in body, body.get("padding")) for body in sent) == [(False, "max_length"), (True, None)]
    for form in ("infinity", "jina", "clip"):
        with make(addresses, form) as encoder:
            for query in (Query.of(text="a cup", image=image_of(1)), Query.of(image=image_of(1), instruction="find this")):
                with pytest.raises(InputError, match="has place for a text or one image"):
                    encoder.encode_queries([query])


def test_vllm_gets_the_form_of_its_model() -> None:
    names = ("Qwen/Qwen3-VL-Embedding-2B", "google/siglip2-base-patch16-224", "openai/clip-vit-base-patch32", "TIGER-Lab/VLM2Vec")
    assert [form_for("vllm", name).name for name in names] == ["qwen3-vl", "siglip", "clip", "vllm"]
    assert form_for("infinity", names[2]).name == "infinity"
    with pytest.raises(InputError, match="did you mean 'infinity'"):
        form_for("infinty", "x")
    assert split_engine("http://127.0.0.1:30000") == (None, "http://127.0.0.1:30000")
    assert split_engine("jina:https://api.jina.ai/v1") == ("jina", "https://api.jina.ai/v1")


def test_our_own_server_gives_the_models_own_vectors(encoder: Encoder, tmp_path: Path) -> None:
    queries = [Query.of(text="a red cup"), Query.of(image=image_of(3)), Query.of(text="then green", image=image_of(4))]
    items = [Item(query.parts) for query in queries]
    with serving_here(tmp_path / "index", encoder) as url, EmbeddingsEncoder(url, "traceir", "objects") as far:
        assert vectors(far.encode_items(items)) == pytest.approx(vectors(encoder.encode_items(items)), abs=1e-6)
        assert vectors(far.encode_queries(queries)) == pytest.approx(vectors(encoder.encode_queries(queries)), abs=1e-6)


def test_an_image_goes_upright_and_without_transparency(tmp_path: Path) -> None:
    photo, clear, plain = tmp_path / "turned.jpg", tmp_path / "clear.png", tmp_path / "plain.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    image_of(1, 40, 24).load().save(photo, exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(clear)
    image_of(2).load().save(plain)
    assert upright_url(ImageInput.open(plain)) == "data:image/jpeg;base64," + base64.b64encode(plain.read_bytes()).decode()
    for path, size in ((photo, (24, 40)), (clear, (8, 8))):
        sent = ImageInput.from_bytes(base64.b64decode(upright_url(ImageInput.open(path)).partition(",")[2]))
        assert sent.load().size == size and np.array_equal(sent.load(), ImageInput.open(path).load())
    photo.write_bytes(photo.read_bytes()[:400])
    with pytest.raises(ImageError):
        upright_url(ImageInput.open(photo))


# Images are proved to be seen


def spelled(text: str, _: Any) -> Any:
    return sum(fakes.vector_of(text[start : start + 4], WIDTH) for start in range(0, min(len(text), 4_000), 4))


@pytest.mark.parametrize(
    ("kind", "form"), [*((form, form) for form in ("vllm", "infinity", "objects", "jina")), ("vllm", "infinity")]
)
def test_a_server_that_ignores_images_or_reads_them_as_text_is_refused(
    addresses: dict[str, str], kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM does the latter with Infinity's form: `modality` is ignored, and the data URI is a text like any other."""
    server = KINDS[kind]
    server.blind, server.noise = True, 1e-4
    own = server.vector
    monkeypatch.setattr(server, "vector", spelled if kind != form else lambda text, image: own(text or "nothing", image))
    with pytest.raises(ModelError, match=f"takes images and does not see them.*is `{form}` its form"):
        EmbeddingsEncoder(addresses[kind], MODEL, form, pause_s=0.01)


def test_what_a_server_does_not_read_is_refused_one_by_one(addresses: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    reads_texts = served(FakeEndpoint(fakes.read_text_model_behind_vllm).app())
    with reads_texts as address, EmbeddingsEncoder(address, MODEL, "vllm", pause_s=0.01) as encoder:
        assert encoder.encode_items(TEXT)[0].vector.shape == (WIDTH,) and encoder.modalities == ("text",)
        with pytest.raises(InputError, match=r"item 'p': this server takes no images: .*400.*not a multimodal model"):
            encoder.encode_items([Item.of(image=image_of(1), id="p")])
    with make(addresses, "openai") as encoder, pytest.raises(InputError, match=r"texts alone; .*write one of vllm:URL"):
        encoder.encode_items([Item.of(image=image_of(1))])
    own = KINDS["objects"].vector
    monkeypatch.setattr(KINDS["objects"], "vector", lambda text, image: own(text, image if text == "padding" else None))
    with make(addresses, "objects") as encoder:
        assert len(encoder.encode_items([Item.of(text="a cup"), Item.of(image=image_of(1))])) == 2
        assert encoder.modalities == ("text", "image")
        with pytest.raises(InputError, match="ignores the image or the text where both are in one input"):
            encoder.encode_items([PAIR])


# Who the model is


def test_the_model_is_known_and_searched_through_noise_and_another_of_the_same_name_is_told(
    addresses: dict[str, str], tmp_path: Path
) -> None:
    first = make(addresses, "vllm").fingerprint
    KINDS["vllm"].noise = 0.02
    assert make(addresses, "vllm", known=first).fingerprint == first
    assert make(addresses, "vllm").fingerprint != first, "the noise is enough to change what is rounded"
    assert len(first) < 120
    with make(addresses, "vllm") as encoder, open_index(tmp_path / "index", encoder, create=True) as index:
        searcher = Searcher(encoder, index)
        searcher.add([Item.of(image=image_of(seed), id=f"p{seed}") for seed in range(5)])
        for route in ("auto", "direct", "reason"):
            assert [hit.id for hit in searcher.search(Query.of(image=image_of(2)), k=1, route=route).hits] == ["p2"]
        with pytest.raises(InputError, match="did you mean 'direct'"):
            encoder.encode_queries([Query.of(text=WORDS)], route="dierct")
    KINDS["vllm"].noise, KINDS["vllm"].salt = 0.0, "other weights"
    with pytest.raises(ModelError, match=r"another model as 'two-towers' than the one that filled the index.*cosines"):
        make(addresses, "vllm", known=first)
    for known in ("a56f2afe30f8bb05", "elsewhere#AAAA"):
        assert make(addresses, "vllm", known=known).fingerprint.startswith(f"{MODEL}#")
    for known in (f"{MODEL}#AAAA", f"{MODEL}#not base64!", f"{MODEL}#"):
        with pytest.raises(ModelError, match="another form than `vllm`, or of other modalities"):
            make(addresses, "vllm", known=known)


def test_the_width_asked_for_and_vectors_in_base64_out_of_order(addresses: dict[str, str]) -> None:
    def packed(reply: dict[str, Any]) -> dict[str, Any]:
        raw = [np.array(row["embedding"], dtype="<f4").tobytes() for row in reply["data"]]
        rows = [{**row, "embedding": base64.b64encode(data).decode()} for row, data in zip(reply["data"], raw, strict=True)]
        return {**reply, "data": rows[::-1]}

    with make(addresses, "openai", dim=16) as encoder:
        assert encoder.width == 16
        plain = vectors(encoder.encode_items(items := [*TEXT, Item.of(text="two")]))
        assert np.linalg.norm(plain, axis=1) == pytest.approx(1, abs=1e-6)
        KINDS["openai"].after = packed
        assert vectors(encoder.encode_items(items)) == pytest.approx(plain, abs=1e-6)
    twice = [{"embedding": [1.0] * 32}, {"embedding": [2.0] * 32}]
    KINDS["openai"].after = lambda reply: {**reply, "data": twice[: len(reply["data"])]}
    with pytest.raises(ModelError, match="32 components where 16 are due"):
        make(addresses, "openai", dim=16)


# Faults


def spoil(**changed: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda reply: {**reply, "data": [{**reply["data"][0], **changed}, *reply["data"][1:]]}


PACKED_NAN = base64.b64encode(np.full(WIDTH, np.nan, dtype="<f4").tobytes()).decode()


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (lambda reply: {**reply, "data": reply["data"][1:]}, "returned 0 vectors for 1 inputs"),
        (lambda reply: {**reply, "data": reply["data"] * 2}, "returned 2 vectors for 1 inputs"),
        (spoil(index=4), "not one for each"),
        (spoil(embedding=[1e39] * WIDTH), "not finite or all zero"),
        (spoil(embedding=[0.0] * WIDTH), "not finite or all zero"),
        (spoil(embedding=PACKED_NAN), "not finite or all zero"),
        (spoil(embedding=[1.0] * (WIDTH - 1)), f"{WIDTH - 1} components where {WIDTH} are due"),
        (spoil(embedding=[[1.0] * WIDTH] * 3), "models of one vector an input"),
        (spoil(embedding="no base64"), "no list of numbers"),
        (spoil(embedding={"float": [1.0]}), "no list of numbers"),
        (spoil(embedding=[]), "models of one vector an input"),
        (lambda reply: {"choices": []}, "no list of embeddings"),
        (lambda reply: [1, 2], "no list of embeddings"),
    ],
)
def test_answers_that_are_no_vectors_are_told_in_words(texts: EmbeddingsEncoder, after: Any, message: str) -> None:
    KINDS["openai"].after = after
    with pytest.raises(ModelError, match=message) as failed:
        texts.encode_items(TEXT)
    assert texts.address in str(failed.value)


def test_what_passes_is_tried_again(texts: EmbeddingsEncoder) -> None:
    server = KINDS["openai"]
    slow = JSONResponse({"error": {"message": "slow down"}}, 429, headers={"Retry-After": "0.01"})
    server.before = {1: slow, 2: JSONResponse({"error": {"message": "out of memory"}}, 500)}.get
    assert texts.encode_items(TEXT)[0].vector == pytest.approx(unit(server.vector(WORDS, None)), abs=1e-6)
    assert len(server.bodies) == 3
    server.before = lambda count: JSONResponse({"error": {"message": "CUDA error"}}, 500)
    with pytest.raises(ModelError, match="answers 500: CUDA error"):
        texts.encode_items(TEXT)
    assert len(server.bodies) == 6


def test_a_refused_request_is_halved_until_only_the_input_at_fault_fails(addresses: dict[str, str], tmp_path: Path) -> None:
    server, lines = KINDS["openai"], [{"id": str(number), "text": f"{WORDS} {number}"} for number in range(40)]

    def small(count: int) -> Response | None:
        fits = len(server.bodies[count - 1]["input"]) <= 8
        return None if fits else JSONResponse({"message": "batch size > maximum allowed"}, 422)

    with make(addresses, "openai") as encoder:
        server.before = small
        wanted = np.stack([unit(server.vector(line["text"], None)) for line in lines])
        assert vectors(encoder.encode_items([Item.of(text=line["text"]) for line in lines])) == pytest.approx(wanted, abs=1e-6)
    server.reset()
    lines[17]["text"] = "word " * 600
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    options = ["--engine", f"openai:{addresses['openai']}", "--model", MODEL]
    assert main(["index", "add", str(tmp_path / "texts.jsonl"), "--index", str(tmp_path / "index"), *options]) == 1
    with open_index(tmp_path / "index") as index:
        assert index.info().count == 39
    with make(addresses, "openai") as encoder, pytest.raises(InputError, match=r"item '17': .*413: .*less than 512 tokens"):
        encoder.encode_items([Item.of(text=line["text"], id=line["id"]) for line in lines])


def test_threads_share_the_requests_in_flight(addresses: dict[str, str]) -> None:
    server = KINDS["vllm"]
    with make(addresses, "vllm", in_flight=4) as encoder, ThreadPoolExecutor(3) as pool:
        server.delay = 0.005
        jobs = [pool.submit(encoder.encode_items, [Item.of(text=f"{n} {m}") for m in range(10)]) for n in range(3)]
        for number, job in enumerate(jobs):
            wanted = np.stack([unit(server.vector(f"{number} {m}", None)) for m in range(10)])
            assert vectors(job.result()) == pytest.approx(wanted, abs=1e-6)
    assert server.most == encoder.in_flight == 4
    with pytest.raises(ModelError, match="is closed"):
        encoder.encode_items(TEXT)


# The command line


@pytest.mark.parametrize("form", ["vllm", "infinity"])
def test_index_and_search_by_command(
    addresses: dict[str, str], form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACEIR_ENGINE_KEY", "from the environment")
    folder = tmp_path / "pictures"
    folder.mkdir()
    for seed in range(8):
        image_of(seed).load().save(folder / f"{seed}.png")
    (folder / "words.txt").write_text(WORDS)
    options = ["--index", str(tmp_path / "index"), "--engine", f"{form}:{addresses[form]}/", "--model", MODEL]
    assert main(["index", "add", str(folder), *options]) == 0
    assert "added 9" in capsys.readouterr().out
    KINDS[form].noise = 1e-3
    for asked, id in ((["--image", str(folder / "7.png")], "7.png"), (["a green cup", "--modality", "text"], "words.txt")):
        assert main(["search", *asked, "--json", "-k", "1", *options]) == 0
        assert json.loads(capsys.readouterr().out)["hits"][0]["id"] == id
    assert KINDS[form].keys == {"Bearer from the environment"}
    KINDS[form].noise, KINDS[form].salt = 0.0, "others"
    assert main(["search", "a cup", *options]) == 2
    assert "another model as 'two-towers'" in capsys.readouterr().err


@pytest.mark.slow
def test_wrong_commands_and_servers_end_in_one_line(
    addresses: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index, there = str(tmp_path / "index"), f"vllm:{addresses['vllm']}"
    (tmp_path / "a.txt").write_text("a")
    for engine, options, message in (
        (there, [], "name the model that is to answer there, by --model NAME"),
        ("vlm:http://127.0.0.1:9", ["--model", "m"], "did you mean 'vllm'"),
        (there, ["--model", "elsewhere"], r"404: The model `elsewhere` does not exist. (its models: two-towers)"),
        (there, ["--model", MODEL, "--profile", "gme"], "--profile works in this process only"),
        ("infinity:http://127.0.0.1:9", ["--model", MODEL], "cannot reach http://127.0.0.1:9/v1/embeddings"),
        ("openai:http://", ["--model", MODEL], "is not an http address"),
        (f"objects:{addresses['jina']}", ["--model", MODEL], "takes no text in the form `objects`"),
        (f"openai:{addresses['vllm']}/nowhere", ["--model", MODEL], "are address and model right?"),
    ):
        assert main(["index", "add", str(tmp_path / "a.txt"), "--index", index, "--engine", engine, *options]) == 2
        shown = capsys.readouterr().err
        assert message in shown and len(shown.strip().splitlines()) == 1
    assert not Path(index).exists()
