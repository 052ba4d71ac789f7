"""Endpoints of embeddings as stand-ins, each as strict with a request as the server it stands for.

What they take and how they refuse it was written from vLLM 0.33.0 (entrypoints/pooling/embed/protocol.py),
Infinity 0.0.77 (fastapi_schemas/pymodels.py; also run, docs/engines.md), text-embeddings-inference 1.9 (router/src/http), SGLang
(entrypoints/openai/protocol.py, serving_embedding.py), and Jina's interface as its clients use it. Vectors follow from content:
pixels, not bytes, make an image's.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from fakes import vector_of
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

MODEL = "two-towers"
WIDTH = 48


class RefusedError(Exception):
    """An error answer: its status and its body."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(body)
        self.status, self.body = status, body


Inputs = list[tuple[str, Image.Image | None]]
Read = Callable[[dict[str, Any], str], Inputs]
"""A request to texts and images, by the rules of one server, for a model of a name."""


class FakeEndpoint:
    """One server. `before` may answer a request in its place, `after` may spoil a reply; `blind` ignores images."""

    def __init__(self, read: Read, paths: Sequence[str] = ("/v1/embeddings",)) -> None:
        self.read, self.paths = read, paths
        self.reset()

    def reset(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.before: Callable[[int], Response | None] = lambda count: None
        self.after: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.blind, self.noise, self.salt = False, 0.0, ""
        self.delay, self.under_way, self.most = 0.0, 0, 0

    def app(self) -> Starlette:
        routes = [Route(path, self._embed, methods=["POST"]) for path in self.paths]
        models = [Route(path.replace("embeddings", "models"), self._models) for path in self.paths]
        return Starlette(routes=[*routes, *models])

    async def _models(self, _: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _embed(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        await asyncio.sleep(self.delay)
        self.under_way -= 1
        if (answer := self.before(len(self.bodies))) is not None:
            return answer
        try:
            return self._answer(body, self.read(body, body.get("model", MODEL)))
        except RefusedError as refused:
            return JSONResponse(refused.body, refused.status)

    def _answer(self, body: dict[str, Any], inputs: Inputs) -> Response:
        vectors = [self.vector(text, image) for text, image in inputs]
        width = body.get("dimensions") or WIDTH
        data = [{"object": "embedding", "index": n, "embedding": vector[:width].tolist()} for n, vector in enumerate(vectors)]
        tokens = sum(len(text.split()) + 9 * (image is not None) for text, image in inputs)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse(self.after({"object": "list", "model": MODEL, "data": data, "usage": usage}))

    def vector(self, text: str, image: Image.Image | None) -> Any:
        """Not of unit length, as some servers send them."""
        made = np.zeros(WIDTH, dtype=np.float32)
        if text:
            made = made + sum(vector_of(self.salt + word.strip(".").lower(), WIDTH) for word in text.split())
        if image is not None and not self.blind:
            small = np.asarray(image.convert("RGB").resize((4, 4), Image.Resampling.BOX), dtype=np.float32) / 127.5 - 1
            made = made + 3 * np.resize(small.ravel(), WIDTH)
        return made + self.noise * np.random.default_rng(len(self.bodies)).normal(size=WIDTH).astype(np.float32)


# The servers


def texts_of(body: dict[str, Any]) -> list[Any]:
    return [body["input"]] if isinstance(body["input"], str) else list(body["input"])


def read_tei(body: dict[str, Any], _: str) -> Inputs:
    """text-embeddings-inference: texts, 32 at most; whatever model is asked for."""
    _demand(body.keys() <= {"input", "model", "user", "encoding_format", "dimensions"}, 422, {"detail": "unknown members"})
    inputs = texts_of(body)
    _demand(all(isinstance(entry, str) for entry in inputs), 422, "input: data did not match any variant")
    _demand(bool(inputs) and all(inputs), 400, {"message": "`inputs` cannot be empty", "code": 400, "type": "empty"})
    _demand(len(inputs) <= 32, 422, {"message": f"batch size {len(inputs)} > maximum allowed batch size 32", "code": 422})
    for text in inputs:
        refusal = {"message": f"`inputs` must have less than 512 tokens. Given: {len(text.split())}", "code": 413}
        _demand(len(text.split()) <= 512, 413, refusal)
    return [(text, None) for text in inputs]


def read_infinity(body: dict[str, Any], _: str) -> Inputs:
    """Infinity: texts, or data URIs of 32 images at most; FastAPI's errors; more members are ignored."""
    modality, inputs = body.get("modality", "text"), texts_of(body)
    fits = modality in ("text", "image") and all(isinstance(entry, str) for entry in inputs)
    _demand(fits, 422, {"detail": [{"loc": ["body", "text", "input"], "msg": "Input should be a string"}]})
    _demand(1 <= len(inputs) <= (2048 if modality == "text" else 32), 422, {"detail": [{"msg": "List too long"}]})
    if modality == "text":
        return [(text.strip(), None) for text in inputs]
    return [("", _decoded(uri, 400)) for uri in inputs]


def read_vllm(body: dict[str, Any], model: str) -> Inputs:
    """vLLM: texts under `input`, or one conversation under `messages`; unknown members are ignored, wrong values are not."""
    _demand(model == MODEL, 404, _openai(f"The model `{model}` does not exist."))
    _demand("normalize" not in body, 400, _openai("removed"))
    _demand(not (body.get("continue_final_message") and body.get("add_generation_prompt")), 400, _openai("both set"))
    if "messages" not in body:
        _demand(all(isinstance(entry, str) for entry in texts_of(body)), 400, _openai("Input should be a valid string"))
        return [(text, None) for text in texts_of(body)]
    for message in body["messages"]:
        fits = set(message) == {"role", "content"} and message["role"] in ("system", "user", "assistant")
        _demand(fits, 400, _openai(f"messages: {message}"))
    parts = [part for message in body["messages"] for part in message["content"]]
    _demand(all(part["type"] in ("image_url", "text") for part in parts), 400, _openai(f"Unknown part type: {parts}"))
    images = [_decoded(part["image_url"]["url"], 400) for part in parts if part["type"] == "image_url"]
    _demand(len(images) <= 1, 400, _openai("At most 1 image(s) may be provided in one prompt."))
    texts = [str(part["text"]) for part in parts if part["type"] == "text" and part["text"]]
    return [(" ".join(texts), images[0] if images else None)]


def read_clip_behind_vllm(body: dict[str, Any], model: str) -> Inputs:
    """vLLM over a CLIP, which has place for a text or an image."""
    inputs = read_vllm(body, model)
    _demand(not any(text and image for text, image in inputs), 400, _openai("CLIP accepts text-only or image-only inputs!"))
    return inputs


def read_text_model_behind_vllm(body: dict[str, Any], model: str) -> Inputs:
    inputs = read_vllm(body, model)
    _demand(not any(image for _, image in inputs), 400, _openai(f"{model} is not a multimodal model"))
    return inputs


def read_sglang(body: dict[str, Any], _: str) -> Inputs:
    """SGLang over GME: texts, or objects of text and image; unknown members are ignored; no text is `padding`."""
    inputs = [{"text": entry} if isinstance(entry, str) else entry for entry in body["input"]]
    _demand(bool(inputs), 400, _openai("Input cannot be empty"))
    return [(entry.get("text") or "padding", _decoded(entry["image"], 400) if entry.get("image") else None) for entry in inputs]


def read_jina(body: dict[str, Any], model: str) -> Inputs:
    """Jina: texts, or objects of one text or one image; a closed set of tasks."""
    known = {"model", "input", "task", "normalized", "embedding_type", "dimensions", "late_chunking", "truncate"}
    _demand(body.keys() <= known, 422, {"detail": "unknown members"})
    tasks = (None, "retrieval.query", "retrieval.passage", "text-matching")
    _demand(model == MODEL and body.get("task") in tasks, 422, {"detail": f"model {model}, task {body.get('task')}"})
    for entry in body["input"]:
        _demand(set(entry) in ({"text"}, {"image"}), 422, {"detail": "an input is a text or an image"})
    return [(entry.get("text", ""), _decoded(entry["image"], 422) if "image" in entry else None) for entry in body["input"]]


def _demand(fits: bool, status: int, body: Any) -> None:
    if not fits:
        raise RefusedError(status, body)


def _decoded(uri: str, status: int) -> Image.Image:
    head, _, data = uri.partition(";base64,")
    _demand(head.startswith("data:image/"), status, _openai("no data URI of an image"))
    try:
        image = Image.open(BytesIO(base64.b64decode(data, validate=True)))
        image.load()
    except (OSError, ValueError) as error:
        raise RefusedError(status, _openai(f"error decoding data URI: {error}")) from error
    return image


def _openai(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None}}
