"""Endpoints of embeddings as stand-ins, each as strict with a request as the server it stands for.

What they take and how they refuse it was written from vLLM 0.33.0 (entrypoints/pooling/embed/protocol.py),
Infinity 0.0.77 (fastapi_schemas/pymodels.py; also run, docs/engines.md), text-embeddings-inference 1.9 (router/src/http), SGLang
(entrypoints/openai/protocol.py, serving_embedding.py), and Jina's interface as its clients use it. Vectors follow from content:
pixels, not bytes, make a picture's.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from fakes import vector_of
from PIL import Image, UnidentifiedImageError
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


Read = Callable[[dict[str, Any], str], list[tuple[str, Image.Image | None]]]
"""A request to texts and pictures, by the rules of one server, for a model of a name."""


class FakeEndpoint:
    """One server. `before` may answer a request in its place, `after` may spoil a reply; `blind` ignores pictures."""

    def __init__(self, read: Read, paths: Sequence[str] = ("/v1/embeddings",)) -> None:
        self.read, self.paths = read, paths
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.before: Callable[[int], Response | None] = lambda count: None
        self.after: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.blind, self.noise, self.salt = False, 0.0, ""

    def app(self) -> Starlette:
        routes = [Route(path, self._embed, methods=["POST"]) for path in self.paths]
        models = [Route(path.replace("embeddings", "models"), self._models) for path in self.paths]
        return Starlette(routes=[*routes, *models])

    async def _models(self, _: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _embed(self, request: Request) -> Response:
        body = json.loads(await request.body())
        with self.lock:
            self.bodies.append(body)
            self.keys.add(request.headers.get("authorization"))
            count = len(self.bodies)
        if (answer := self.before(count)) is not None:
            return answer
        try:
            inputs = self.read(body, body.get("model", MODEL))
        except RefusedError as refused:
            return JSONResponse(refused.body, refused.status)
        vectors = [self.vector(text, image) for text, image in inputs]
        width = body.get("dimensions") or WIDTH
        data = [{"object": "embedding", "index": n, "embedding": vector[:width].tolist()} for n, vector in enumerate(vectors)]
        tokens = sum(len(text.split()) + 9 * (image is not None) for text, image in inputs)
        return JSONResponse(
            self.after(
                {"object": "list", "model": MODEL, "data": data, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
            )
        )

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


def read_tei(body: dict[str, Any], _: str) -> list[tuple[str, Image.Image | None]]:
    """text-embeddings-inference: texts, 32 at most; whatever model is asked for."""
    _only(body, {"input", "model", "user", "encoding_format", "dimensions"}, 422)
    inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
    if not all(isinstance(one, str) for one in inputs):
        raise RefusedError(422, "Failed to deserialize the JSON body into the target type: input: data did not match any variant")
    if not inputs or not all(inputs):
        raise RefusedError(400, {"message": "`inputs` cannot be empty", "code": 400, "type": "empty"})
    if len(inputs) > 32:
        raise RefusedError(
            422, {"message": f"batch size {len(inputs)} > maximum allowed batch size 32", "code": 422, "type": "Validation"}
        )
    for text in inputs:
        if len(text.split()) > 512:
            told = f"`inputs` must have less than 512 tokens. Given: {len(text.split())}"
            raise RefusedError(413, {"message": told, "code": 413, "type": "Validation"})
    return [(text, None) for text in inputs]


def read_infinity(body: dict[str, Any], _: str) -> list[tuple[str, Image.Image | None]]:
    """Infinity: texts, or data URIs of 32 pictures at most; FastAPI's errors; more members are ignored."""
    modality, inputs = body.get("modality", "text"), body["input"] if isinstance(body["input"], list) else [body["input"]]
    if modality not in ("text", "image") or not all(isinstance(one, str) for one in inputs):
        raise RefusedError(
            422, {"detail": [{"type": "string_type", "loc": ["body", "text", "input"], "msg": "Input should be a string"}]}
        )
    if not 1 <= len(inputs) <= (2048 if modality == "text" else 32):
        raise RefusedError(422, {"detail": [{"type": "too_long", "loc": ["body", modality, "input"], "msg": "List too long"}]})
    if modality == "text":
        return [(text.strip(), None) for text in inputs]
    return [
        ("", _decoded(uri, lambda why: RefusedError(400, {"error": {"message": f"ImageCorruption -> {why}"}}))) for uri in inputs
    ]


def read_vllm(body: dict[str, Any], model: str) -> list[tuple[str, Image.Image | None]]:
    """vLLM: texts under `input`, or one conversation under `messages`; unknown members are ignored, wrong values are not."""
    if model != MODEL:
        raise RefusedError(404, _openai(f"The model `{model}` does not exist.", 404))
    if "normalize" in body or (body.get("continue_final_message") and body.get("add_generation_prompt")):
        raise RefusedError(400, _openai("removed, or both set", 400))
    if "messages" not in body:
        inputs = [body["input"]] if isinstance(body["input"], str) else body["input"]
        if not all(isinstance(one, str) for one in inputs):
            raise RefusedError(400, _openai("Input should be a valid string", 400))
        return [(text, None) for text in inputs]
    texts: list[str] = []
    images: list[Image.Image] = []
    for message in body["messages"]:
        if set(message) != {"role", "content"} or message["role"] not in ("system", "user", "assistant"):
            raise RefusedError(400, _openai(f"messages: {message}", 400))
        for part in message["content"]:
            if part["type"] == "image_url":
                images.append(_decoded(part["image_url"]["url"], lambda why: RefusedError(400, _openai(why, 400))))
            elif part["type"] == "text" and isinstance(part["text"], str):
                texts.append(part["text"])
            else:
                raise RefusedError(400, _openai(f"Unknown part type: {part['type']}", 400))
    if len(images) > 1:
        raise RefusedError(400, _openai("At most 1 image(s) may be provided in one prompt.", 400))
    return [(" ".join(text for text in texts if text), images[0] if images else None)]


def read_clip_behind_vllm(body: dict[str, Any], model: str) -> list[tuple[str, Image.Image | None]]:
    """vLLM over a CLIP, which has place for a text or a picture."""
    found = read_vllm(body, model)
    if any(text and image for text, image in found):
        raise RefusedError(400, _openai("CLIP accepts text-only or image-only inputs, not both!", 400))
    return found


def read_text_model_behind_vllm(body: dict[str, Any], model: str) -> list[tuple[str, Image.Image | None]]:
    found = read_vllm(body, model)
    if any(image for _, image in found):
        raise RefusedError(400, _openai(f"{model} is not a multimodal model", 400))
    return found


def read_sglang(body: dict[str, Any], _: str) -> list[tuple[str, Image.Image | None]]:
    """SGLang over GME: texts, or objects of text and picture; unknown members are ignored; no text is `padding`."""
    found: list[tuple[str, Image.Image | None]] = []
    for one in body["input"]:
        if isinstance(one, str):
            found.append((one, None))
            continue
        image = _decoded(one["image"], lambda why: RefusedError(400, _openai(why, 400))) if one.get("image") else None
        found.append((one.get("text") or "padding", image))
    if not found:
        raise RefusedError(400, _openai("Input cannot be empty", 400))
    return found


def read_jina(body: dict[str, Any], model: str) -> list[tuple[str, Image.Image | None]]:
    """Jina: texts, or objects of one text or one picture; a closed set of tasks."""
    _only(body, {"model", "input", "task", "normalized", "embedding_type", "dimensions", "late_chunking", "truncate"}, 422)
    if model != MODEL or body.get("task") not in (None, "retrieval.query", "retrieval.passage", "text-matching"):
        raise RefusedError(422, {"detail": f"model {model}, task {body.get('task')}"})
    found: list[tuple[str, Image.Image | None]] = []
    for one in body["input"]:
        if set(one) not in ({"text"}, {"image"}):
            raise RefusedError(422, {"detail": "an input is a text or an image"})
        image = _decoded(one["image"], lambda why: RefusedError(422, {"detail": why})) if "image" in one else None
        found.append((one.get("text", ""), image))
    return found


def _only(body: dict[str, Any], known: set[str], status: int) -> None:
    if unknown := set(body) - known:
        raise RefusedError(status, {"detail": f"unknown members: {sorted(unknown)}"})


def _decoded(uri: str, refuse: Callable[[str], RefusedError]) -> Image.Image:
    head, _, data = uri.partition(";base64,")
    if not head.startswith("data:image/"):
        raise refuse("no data URI of a picture")
    try:
        image = Image.open(BytesIO(base64.b64decode(data, validate=True)))
        image.load()
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise refuse(f"error decoding data URI: {error}") from error
    return image


def _openai(message: str, status: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}
