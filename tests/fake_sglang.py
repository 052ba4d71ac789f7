"""SGLang's /generate as a stand-in: its request and reply, its stops, its image tokens, around a real checkpoint.

What computes here is transformers alone (its model, its image processor, no cache), so that nothing is shared with the encoder
under test but the weights. Faults are injected by a test through `before` and `after`.
"""

from __future__ import annotations

import base64
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import httpx
import torch
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from traceir.retrieval.search import EncoderLike
from traceir.serve.run import ServeConfig, make_application, make_server

PREFERRED = {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.3, "min_new_tokens": 4}
"""What the server fills in where a request leaves it out; a request that is not greedy in every field goes astray."""
IMAGE_PAD = 5
END_OF_TURN = 2


class FakeSGLang:
    """One server over one checkpoint. `before` may answer a request in its place, `after` may spoil a reply."""

    def __init__(self, checkpoint: Path, weight_version: str) -> None:
        self.network = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.images = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self.lock = threading.Lock()
        self.address = ""
        self.checkpoint, self.weight_version = checkpoint, weight_version
        self.reset()

    def reset(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.before: Callable[[int], Response | None] = lambda count: None
        self.after: Callable[[dict[str, Any]], Any] = lambda reply: reply
        self.retokenizes = False
        self.more_stops: set[int] = set()
        path, version = "served/" + self.checkpoint.name, self.weight_version
        self.model_info: dict[str, Any] = {"model_path": path, "is_generation": True, "weight_version": version}
        self.server_info: dict[str, Any] = {"version": "0.5.23", "return_hidden_states_mode": "last"}
        self.server_info |= {"speculative_algorithm": None, "enable_deterministic_inference": True}

    def app(self) -> Starlette:
        async def info(request: Request) -> Response:
            return JSONResponse(self.model_info if "model" in request.url.path else self.server_info)

        async def generate(request: Request) -> Response:
            return await run_in_threadpool(self._answer, await request.json())

        return Starlette(routes=[Route("/{name}_info", info), Route("/generate", generate, methods=["POST"])])

    def _answer(self, body: dict[str, Any]) -> Response:
        with self.lock:
            self.bodies.append(body)
            if (instead := self.before(len(self.bodies))) is not None:
                return instead
            try:
                return Response(json.dumps(self.after(self.generate(body))), media_type="application/json")
            except ValueError as error:
                return JSONResponse({"error": {"message": str(error)}}, status_code=400)

    @torch.inference_mode()
    def generate(self, body: dict[str, Any]) -> dict[str, Any]:
        if body.get("return_hidden_states") not in (False, "last"):
            raise ValueError("The requested return_hidden_states mode exceeds the server maximum `last`.")
        sampling = {**PREFERRED, **body["sampling_params"]}
        ids, seen = self._expanded(body)
        stops = {*sampling.get("stop_token_ids", ()), END_OF_TURN, *self.more_stops}
        written: list[int] = []
        emb_logprobs, top, state, finish = [], [], None, None
        while finish is None:
            state, logits = self._step(ids + written, seen)
            logprobs = torch.log_softmax(logits, -1)
            emb_logprobs.append([[float(logprobs[token]), token, None] for token in body.get("token_ids_logprob") or ()])
            best = torch.topk(logprobs, max(1, body.get("top_logprobs_num", 0)))
            top.append([[float(value), int(token), None] for value, token in zip(*best, strict=True)])
            written.append(self._choose(logits, ids + written, sampling, len(written), stops))
            if written[-1] in stops:
                finish = {"type": "stop", "matched": written[-1]}
            elif len(written) >= sampling["max_new_tokens"]:
                finish = {"type": "length", "length": len(written)}
        meta: dict[str, Any] = {"finish_reason": finish, "prompt_tokens": len(ids), "completion_tokens": len(written)}
        meta |= {"weight_version": self.model_info["weight_version"], "num_retractions": 0}
        if body["return_hidden_states"]:
            meta["hidden_states"] = state.tolist()
        if body.get("return_logprob"):
            meta |= {"output_token_ids_logprobs": emb_logprobs, "output_top_logprobs": top}
        reply = {"text": self.tokenizer.decode(written, skip_special_tokens=True), "output_ids": written, "meta_info": meta}
        return reply | ({"prompt_token_ids": ids} if body.get("return_prompt_token_ids") else {})

    def _expanded(self, body: dict[str, Any]) -> tuple[list[int], dict[str, torch.Tensor]]:
        """Token ids with as many image tokens as each image takes, and the images as the network reads them."""
        tokens = [int(token) for token in body["input_ids"]]
        if self.retokenizes:
            tokens = self.tokenizer.encode(self.tokenizer.decode(tokens), add_special_tokens=False)
        files = [base64.b64decode(url.split(",", 1)[1], validate=True) for url in body.get("image_data") or ()]
        images = [Image.open(BytesIO(file)) for file in files]
        if tokens.count(IMAGE_PAD) != len(images):
            raise ValueError(f"prompt has {tokens.count(IMAGE_PAD)} image placeholder token(s) but {len(images)} image(s)")
        if not images:
            return tokens, {}
        seen = self.images(images=images, return_tensors="pt")
        counts = iter((seen["image_grid_thw"].prod(-1) // self.images.merge_size**2).tolist())
        ids = [copy for token in tokens for copy in ([token] * next(counts) if token == IMAGE_PAD else [token])]
        return ids, {"pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"]}

    def _step(self, ids: Sequence[int], seen: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        ids_BT = torch.tensor([ids])
        kinds, mask = (ids_BT == IMAGE_PAD).int(), torch.ones_like(ids_BT)
        out = self.network.model(input_ids=ids_BT, attention_mask=mask, mm_token_type_ids=kinds, use_cache=False, **seen)
        state = out.last_hidden_state[0, -1]
        return state, self.network.lm_head(state)

    def _choose(self, logits: torch.Tensor, before: Sequence[int], sampling: dict[str, Any], step: int, stops: set[int]) -> int:
        logits = logits.clone()
        if sampling["repetition_penalty"] != 1.0:
            logits[list(set(before))] -= math.log(sampling["repetition_penalty"]) * 20
        if step < sampling["min_new_tokens"]:
            logits[list(stops)] = -math.inf
        if sampling["temperature"] > 0 and sampling["top_k"] != 1:
            return int(torch.multinomial(torch.softmax(logits / sampling["temperature"], -1), 1))
        return int(logits.argmax())


@contextmanager
def served(app: Any, *, lifespan: Literal["on", "off"] = "off") -> Iterator[str]:
    """An ASGI app on a free port of this machine, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan=lifespan))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def serving_here(
    index: Path, encoder: EncoderLike, *, wrap: Callable[[Any], Any] = lambda app: app, **options: Any
) -> Iterator[str]:
    """`traceir serve` over an encoder of this process, in a thread of it; yields its address once it is ready."""
    config = ServeConfig(str(index), **options)
    with served(wrap(make_application(config, make_server(config, lambda: encoder))), lifespan="on") as url:
        with httpx.Client() as http:
            while http.get(f"{url}/ready").status_code != 200:
                time.sleep(0.02)
        yield url
