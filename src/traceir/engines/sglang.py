"""An encoder over SGLang's HTTP server (0.5.17 or later): its `/generate`, with the last hidden state of each request.

Prompts, token ids and images are made here by the same code as in `encoder.py`, from the checkpoint's tokenizer and
traceir.json; the weights stay with the engine. Commands, and what was verified how: docs/engines.md. Shapes: D width.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Unpack

from PIL import Image

from traceir.batch import Pixels, Processor, smart_resize
from traceir.checkpoint import fetch
from traceir.connection import Answer, TransientError
from traceir.engines.base import WEIGHTS, ConnectionOptions, HttpEngine
from traceir.errors import ModelError
from traceir.images import ImageInput, data_url, file_bytes
from traceir.items import Encoding, Ended, Item, Query, Route, TakenRoute, Vector, check_route
from traceir.model import NETWORKS, TraceModel, image_budget, read_settings
from traceir.prompts import IMAGE_PAD, TURN_END

log = logging.getLogger(__name__)

OLDEST: Final = (0, 5, 17)
"""The first SGLang whose requests may ask for the last hidden state alone."""
_UNNAMED: Final = ("", "default")
"""What SGLang gives as weight version where its launch named none."""
_LAUNCH: Final = "launch it with `--return-hidden-states-mode last`"
_GREEDY: Final[Mapping[str, Any]] = {
    "temperature": 0.0, "top_p": 1.0, "top_k": 1, "min_p": 0.0, "frequency_penalty": 0.0, "presence_penalty": 0.0,
    "repetition_penalty": 1.0, "min_new_tokens": 0, "n": 1, "ignore_eos": False,
}  # fmt: skip
"""Every field, since a server fills what is left out from its own preferred sampling."""


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """A prompt as the engine takes it, with one image token and one data URL an image; `read` is what it must make of it, `cut`
    the text's tokens beyond its limit, and `probability` whether P(`<|emb|>`) is asked for."""

    ids: tuple[int, ...]
    images: tuple[str, ...]
    read: tuple[int, ...]
    cut: int
    route: Route
    probability: bool


@dataclass(frozen=True, slots=True)
class _Reply:
    """What one request wrote, the stop token included; the unit state [D] that predicted its last token; whether a stop ended it;
    P(`<|emb|>`) and the likeliest tokens of the first step, where they were asked for."""

    ids: tuple[int, ...]
    state: Vector
    stopped: bool
    emb_probability: float
    others: tuple[int, ...]


class SGLangEncoder(HttpEngine):
    """Queries and items to Encodings by an SGLang server at `address` that serves the checkpoint `model`.

    `model` is the same directory or hub id that an in-process Encoder would load; only its tokenizer and settings are read.
    Another model, an old release or missing flags raise ModelError at once. `dim` is Encoder's. Results are in the order of the
    input. The engine computes in its own precision: the text may differ from an Encoder's where two tokens are almost as likely.
    """

    def __init__(
        self,
        address: str,
        model: str | Path,
        *,
        max_reasoning_tokens: int | None = None,
        dim: int | None = None,
        **options: Unpack[ConnectionOptions],
    ) -> None:
        self.model, self._name = without_weights(model), str(model)
        settings = self.model.settings
        self.dim = settings.checked_dim(dim, self.model.width)
        self.budget = max_reasoning_tokens or settings.max_reasoning_tokens
        self.fingerprint, self.width = self.model.fingerprint, self.dim or self.model.width
        self.prompt_version = settings.vector_version(self.dim)
        super().__init__(re.sub(r"/(v1|generate)?/*$", "", address), options)

    @property
    def widths(self) -> tuple[int, ...]:
        """What its vectors may be cut to: those that the checkpoint was trained for."""
        return self.model.settings.widths(self.width)

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        """Candidates: one prefill each, never any reasoning, unless the checkpoint lets candidates write."""
        route: Route = "auto" if self.model.writes("candidate") else "direct"
        return self._connection.gather([partial(self._encode, item, route) for item in items])

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        """Queries by the given route. `reason` costs a second request where the model would have bypassed."""
        check_route(route)
        route = route if self.model.writes("query") else "direct"
        return self._connection.gather([partial(self._encode, query, route) for query in queries])

    def prepare(self, content: Query | Item, route: Route) -> EngineRequest:
        """Token ids and images as SGLang wants them: it repeats each image token itself, once it has sized the image."""
        prompt, processor = self.model.prompt(content, direct=route == "direct"), self.model.processor
        layout, pad = processor.lay_out(prompt), processor.special[IMAGE_PAD]
        read = tuple(layout.ids.tolist())
        ids = tuple(token for n, token in enumerate(read) if token != pad or n == 0 or read[n - 1] != pad)
        images = tuple(_png_url(*pair, processor) for pair in zip(prompt.images, layout.pixels, strict=True))
        return EngineRequest(ids, images, read, layout.cut, route, isinstance(content, Query))

    def start(self, asked: EngineRequest) -> Future[Encoding]:
        """What `prepare` made, on its way; cancelling the future gives the request up, at the engine too."""
        return self._connection.start(partial(self._run, asked))

    async def _encode(self, content: Query | Item, route: Route) -> Encoding:
        return await self._run(await asyncio.to_thread(self.prepare, content, route))

    async def _run(self, asked: EngineRequest) -> Encoding:
        if asked.route != "direct":
            return await self._write(asked)
        reply = await self._generate(asked, (), 1, probability=asked.probability)
        return self._encoding(asked, (), reply.state, reply.emb_probability, None)

    async def _write(self, asked: EngineRequest) -> Encoding:
        """Lets the model write until `<|emb|>`, `<|im_end|>`, or the budget, as `Encoder` does.

        Two cases go on with a second request, whose prompt ends in what was written so far: under `reason` a bypass is replaced
        by the second likeliest token, and `<|im_end|>` at the first step, or a stop token of the engine's that is none of ours,
        is read like any other token. The engine's own `min_new_tokens` forbids all stop tokens and hides P(`<|emb|>`).
        """
        emb, turn_end = self.model.processor.emb_id, self.model.processor.special[TURN_END]
        written: tuple[int, ...] = ()
        probability: float | None = None
        while True:
            reply = await self._generate(asked, written, self.budget + 1 - len(written), probability=probability is None)
            probability = reply.emb_probability if probability is None else probability
            whole = written + reply.ids
            if whole == (emb,) and asked.route == "reason":
                written = (next(token for token in reply.others if token != emb),)
                continue
            if whole[-1] == emb:
                return self._encoding(asked, whole[:-1], reply.state, probability, None)
            if not reply.stopped or len(whole) > self.budget or (whole[-1] == turn_end and len(whole) > 1):
                if self.model.settings.closing:  # the state behind the trained closing text, by a request of its own
                    closing = tuple(self.model.processor.plain_ids(self.model.settings.closing))
                    reply = await self._generate(asked, whole[:-1] + closing, 1, probability=False)
                return self._encoding(asked, whole[:-1], reply.state, probability, "turn" if whole[-1] == turn_end else "budget")
            written = whole

    def _encoding(
        self, asked: EngineRequest, written: tuple[int, ...], state: Vector, probability: float, ended: Ended
    ) -> Encoding:
        text, limit = self.model.processor.decode(written), self.model.settings.max_text_tokens if asked.cut else None
        route: TakenRoute = "reason" if written else "direct"
        return Encoding(state, route, text, len(written), probability, ended is not None, asked.cut, ended, limit)

    async def _generate(self, asked: EngineRequest, written: tuple[int, ...], most: int, *, probability: bool) -> _Reply:
        """One request for at most so many tokens after what was written."""
        body = self._body(asked, written, most, probability)
        answer = await self._connection.request("POST", "/generate", body, refused=(400, 404, 422), check=self._check_finished)
        if answer.status > 299:
            raise self._wrong(_refusal(answer))
        return self._read(answer.body, asked.read + written, probability)

    def _check_finished(self, answer: Answer) -> None:
        """Raises TransientError where the engine gave the request up for now, ModelError where it did for good."""
        finish = _finish(answer.body)
        if finish.get("type") == "abort":
            kind = TransientError if finish.get("status_code") in (429, 503) else ModelError
            raise self._wrong(f"gave a request up: {finish.get('message')}", kind)

    def _body(self, asked: EngineRequest, written: tuple[int, ...], most: int, probability: bool) -> dict[str, Any]:
        """The request. `last` and never `true`: the full form misplaces rows after a prefill in chunks."""
        emb = self.model.processor.emb_id
        stops = [emb, self.model.processor.special[TURN_END]]
        body: dict[str, Any] = {
            "input_ids": [*asked.ids, *written],
            "sampling_params": {**_GREEDY, "max_new_tokens": most, "stop_token_ids": stops},
            "return_hidden_states": "last",
            "stream": False,
        }
        if asked.images:
            body |= {"image_data": list(asked.images), "return_prompt_token_ids": True}
        if probability:
            body |= {"return_logprob": True, "token_ids_logprob": [emb], "top_logprobs_num": 2}
        return body

    def _read(self, body: Any, read: tuple[int, ...], probability: bool) -> _Reply:
        """The reply's parts, each checked."""
        if not isinstance(body, dict) or not isinstance(body.get("meta_info"), dict):
            raise self._wrong(f"answers with {str(body)[:120]!r}, which is no reply of SGLang's /generate")
        meta: dict[str, Any] = body["meta_info"]
        ids = self._written(body)
        self._check_read(body, meta, read)
        if self._weight_version != (version := str(meta.get("weight_version") or self._weight_version)):
            raise self._wrong(f"changed its weights to {version!r}; make a new encoder for the checkpoint that it serves now")
        first, others = _first_step(meta) if probability else (1.0, ())
        if probability and (math.isnan(first) or len(others) < 2):
            raise self._wrong("returned no log-probabilities; is a proxy between that drops them?")
        return _Reply(ids, self._state(meta.get("hidden_states")), _finish(body).get("type") == "stop", first, others)

    def _written(self, body: Mapping[str, Any]) -> tuple[int, ...]:
        """The tokens of a reply, with the stop token where it was trimmed."""
        matched, ids = _finish(body).get("matched"), body.get("output_ids")
        if isinstance(matched, str):
            raise self._wrong(f"stopped with {matched!r} instead of a token; {WEIGHTS}")
        written = tuple(ids) if isinstance(ids, list) and all(isinstance(token, int) for token in ids) else ()
        if isinstance(matched, int) and written[-1:] != (matched,):
            written += (matched,)
        if not written:
            raise self._wrong("returned no output_ids; TraceIR needs an SGLang of 0.5.17 or later")
        return written

    def _state(self, rows: Any) -> Vector:
        """The last row of whatever form came: [D] under `last`, else rows of steps, of which the first may be a whole prefill."""
        if not rows:
            raise self._wrong(f"returned no hidden states; {_LAUNCH}")
        while isinstance(rows, list) and rows and isinstance(rows[-1], list):
            rows = rows[-1]
        whole = self.model.width
        if isinstance(rows, list) and len(rows) > whole and len(rows) % whole == 0:
            raise self._wrong(f"returned {len(rows)} components: it joins several layers; launch it without speculation")
        return self._unit(self._unit(rows, "state", whole)[: self.dim], "state", self.width)

    def _check_read(self, body: Mapping[str, Any], meta: Mapping[str, Any], read: tuple[int, ...]) -> None:
        """Holds the engine to our tokens. Where images stand, only their number counts: some releases put hashes there."""
        pad, seen = self.model.processor.special[IMAGE_PAD], body.get("prompt_token_ids")
        alike, count = True, meta.get("prompt_tokens", len(read))
        if isinstance(seen, list):
            alike, count = all(ours in (pad, its) for ours, its in zip(read, seen, strict=False)), len(seen)
        if count != len(read) or not alike:
            raise self._wrong(
                f"read a prompt of {count} tokens that is not TraceIR's of {len(read)}: it took a text apart anew or sized a "
                "image otherwise; launch it with SGLANG_MM_AVOID_RETOKENIZE=1 and the checkpoint's own preprocessor_config.json"
            )

    def _meet(self) -> None:
        """Asks which weights are served (`_weight_version` as the engine calls them), and how it was launched."""
        model = self._info("/model_info", "/get_model_info")
        if not model:
            raise self._wrong("has no /model_info; is it an SGLang server?")
        if model.get("is_generation") is False:
            raise self._wrong("serves embeddings, which cannot write; launch it without --is-embedding")
        self._weight_version = str(model.get("weight_version") or "")
        if other := self._other(self._weight_version, str(model.get("model_path") or "")):
            raise self._wrong(
                f"serves {other}, not {self._name} (fingerprint {self.fingerprint!r}); give the model it serves, or launch it "
                f"with --weight-version {self.fingerprint} if it is the same"
            )
        self._check_launch(self._info("/server_info", "/get_server_info"))

    def _other(self, version: str, path: str) -> str:
        """What is served where it is not this model, else ""; told by its version, its folder, or only its name."""
        if version not in _UNNAMED:
            return "" if version == self.fingerprint else f"weight version {version!r}"
        served = read_settings(Path(path, "traceir.json")) if path else None
        if served is not None:
            same = served.fingerprint == self.fingerprint
            return "" if same else f"{path}, whose fingerprint is {served.fingerprint!r}"
        if Path(path).name != Path(self._name).name:
            return path or "an unnamed model"
        log.warning("%s serves a model named %r; only the name could be compared, see docs/engines.md", self.address, path)
        return ""

    def _check_launch(self, info: Mapping[str, Any]) -> None:
        """What its launch must and must not have switched on, as far as the engine tells."""
        version = tuple(int(part) for part in re.findall(r"\d+", str(info.get("version", "")))[:3])
        speculates = str(info.get("speculative_algorithm") or "")
        if version and version < OLDEST:
            raise self._wrong(f"is SGLang {info['version']}; hidden states of mode `last` need 0.5.17 or later")
        if "return_hidden_states_mode" in info and info["return_hidden_states_mode"] not in ("last", "full"):
            raise self._wrong(f"was launched without hidden states; {_LAUNCH}")
        if speculates.upper() == "NGRAM":
            raise self._wrong("speculates by NGRAM, which returns states of other positions; launch it without")
        if speculates:
            log.warning("%s speculates (%s): not tested with TraceIR", self.address, speculates)
        if info.get("enable_deterministic_inference") is False:
            log.warning("%s is not deterministic: reasoning may depend on what else it computes at the time", self.address)

    def _info(self, *paths: str) -> dict[str, Any]:
        """What the engine says of itself under the first of these paths that it has; {} where it has none."""
        bodies = (self._connection.call("GET", path, refused=(404, 405)).body for path in paths)
        return next((body for body in bodies if isinstance(body, dict)), {})


def without_weights(source: str | Path) -> TraceModel:
    """A checkpoint as a TraceModel that renders and lays out, and cannot run; ModelError for what an engine cannot serve."""
    from transformers import AutoConfig, AutoTokenizer

    name = str(source)
    try:
        local = fetch(name, weights=False)
        settings = read_settings(local / "traceir.json")
        if settings is None or not (local / "config.json").is_file():
            raise ModelError(f"{name} has no config.json with traceir.json; an engine serves whole checkpoints: `traceir merge`")
        config = AutoConfig.from_pretrained(local, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {name}: {error}") from error
    position = settings.pooling_position
    if config.model_type not in NETWORKS or settings.profile is not None or position == "at_token":
        raise ModelError(
            f"{name} ({config.model_type}, read {position}) cannot be encoded by an engine: it gives the state before a token "
            "and knows no profiles; encode it in this process"
        )
    if not settings.fingerprint:
        raise ModelError(f"{name}: traceir.json names no fingerprint; save the checkpoint again by this release")
    image = image_budget(local / "preprocessor_config.json", config)
    processor = Processor(tokenizer, image, pooling_position=position, max_text_tokens=settings.max_text_tokens)
    return TraceModel(SimpleNamespace(config=config), processor, settings)


def _png_url(image: ImageInput, pixels: Pixels, processor: Processor) -> str:
    """The image as PNG, at the size the model sees; as it is where Qwen's rule would resize even that."""
    height, width = pixels.shape[:2]
    settled = smart_resize(height, width, processor.image) == (height, width)
    return data_url(file_bytes(Image.fromarray(pixels) if settled else image.load(), "PNG", compress_level=1), "image/png")


def _refusal(answer: Answer) -> str:
    remedy = "is it an SGLang server?" if answer.status == 404 else "see the engine's log"
    if "hidden state" in answer.message:
        remedy = _LAUNCH
    elif "context length" in answer.message:
        remedy = "raise its --context-length, or lower max_text_tokens or the image's size"
    return f"refuses a request ({answer.status}: {answer.message}); {remedy}"


def _finish(body: Any) -> dict[str, Any]:
    """Why a reply ended, as the engine says it."""
    meta = body.get("meta_info") if isinstance(body, dict) else None
    reason = meta.get("finish_reason") if isinstance(meta, dict) else None
    return reason if isinstance(reason, dict) else {"type": reason}


def _first_step(meta: Mapping[str, Any]) -> tuple[float, tuple[int, ...]]:
    """P(`<|emb|>`) at the first step, NaN where it is missing, and the likeliest tokens there, best first."""
    try:
        chance = math.exp(float(meta["output_token_ids_logprobs"][0][0][0]))
        return chance, tuple(int(entry[1]) for entry in meta["output_top_logprobs"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return math.nan, ()
