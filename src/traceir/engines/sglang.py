"""An encoder over SGLang's HTTP server (0.5.17 or later): its `/generate`, with the last hidden state of each request.

Prompts, token ids and pictures are made here by the same code as in `encoder.py`, from the checkpoint's tokenizer and
traceir.json; the weights stay with the engine. What has to be asked for, and why, stands at `_sampling` and `_body`; what is
checked of an engine, in `_check_model` and `_check_server`. Commands, and what was verified how: docs/engines.md.
Shapes: D width.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
from PIL import Image

from traceir.batch import Layout, Pixels, Processor, smart_resize
from traceir.checkpoint import fetch
from traceir.connection import Connection, TransientError
from traceir.errors import ModelError
from traceir.images import ImageInput
from traceir.items import Encoding, Ended, Item, Query, Route, TakenRoute, Vector, check_route
from traceir.model import NETWORKS, TraceModel, image_budget, read_settings
from traceir.prompts import IMAGE_PAD, TURN_END, Prompt

log = logging.getLogger(__name__)

OLDEST: Final = (0, 5, 17)
"""The first SGLang whose requests may ask for the last hidden state alone."""
_UNNAMED: Final = ("", "default")
"""What SGLang gives as weight version where its launch named none."""
_LAUNCH: Final = "launch it with `--return-hidden-states-mode last`"


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as the engine takes it, with one image token and one data URL a picture; `read` is what it must make of it.

    `cut`: the text's tokens beyond its limit; `probability`: whether P(`<|emb|>`) is asked for.
    """

    ids: tuple[int, ...]
    images: tuple[str, ...]
    read: tuple[int, ...]
    cut: int
    route: Route
    probability: bool


@dataclass(frozen=True, slots=True)
class _Reply:
    """What one request wrote, the stop token included; the state [D] that predicted its last token; why it ended.

    `emb_probability` and `others`, the likeliest tokens, are those of the first step, where they were asked for.
    """

    ids: tuple[int, ...]
    state: Vector
    stopped: bool
    emb_probability: float
    others: tuple[int, ...]


class SGLangEncoder:
    """Queries and items to Encodings by an SGLang server at `address` that serves the checkpoint `model`.

    `model` is the same directory or hub id that an in-process Encoder would load; only its tokenizer and settings are read. The
    server is asked at once who it is: another model, an old release or missing flags raise ModelError. Results are in the order
    of the input. Thread-safe; all threads share the `in_flight` requests. Greedy, but the engine computes in its own precision
    and batches: the text may differ from an Encoder's where two tokens are almost equally likely.
    """

    def __init__(
        self,
        address: str,
        model: str | Path,
        *,
        api_key: str = "",
        in_flight: int = 64,
        timeout_s: float = 120.0,
        tries: int = 7,
        pause_s: float = 0.25,
        max_reasoning_tokens: int | None = None,
    ) -> None:
        self.model = without_weights(model)
        self.budget = max_reasoning_tokens or self.model.settings.max_reasoning_tokens
        address = re.sub(r"/(v1|generate)?/*$", "", address)
        self._connection = Connection(address, api_key, in_flight=in_flight, timeout_s=timeout_s, tries=tries, pause_s=pause_s)
        self._name = str(model)
        try:
            self._weight_version = self._check_model()
            self._check_server()
        except BaseException:
            self.close()
            raise

    @property
    def address(self) -> str:
        return self._connection.address

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    @property
    def prompt_version(self) -> str:
        """As an in-process Encoder names it, so that both may fill and search one index."""
        version, position = self.model.settings.prompt_version, self.model.settings.pooling_position
        return version if position == "before_token" else f"{version}, read {position}"

    @property
    def width(self) -> int:
        return self.model.width

    def encode_items(self, items: Sequence[Item]) -> list[Encoding]:
        """Candidates: one prefill each, never any reasoning, unless the checkpoint lets candidates write."""
        route: Route = "auto" if self.model.writes("candidate") else "direct"
        return self._connection.gather([partial(self._one, item, route) for item in items])

    def encode_queries(self, queries: Sequence[Query], *, route: Route = "auto") -> list[Encoding]:
        """Queries by the given route. `reason` costs a second request where the model would have bypassed."""
        check_route(route)
        if not self.model.writes("query"):
            route = "direct"
        return self._connection.gather([partial(self._one, query, route) for query in queries])

    def prepare(self, content: Query | Item, route: Route) -> Asked:
        """Token ids and pictures as SGLang wants them: it repeats each image token itself, once it has sized the picture."""
        prompt, processor = self.model.prompt(content, direct=route == "direct"), self.model.processor
        layout = processor.lay_out(prompt)
        read = tuple(layout.ids.tolist())
        ids, images = _folded(read, processor.special[IMAGE_PAD]), _images(prompt, layout, processor)
        return Asked(ids, images, read, layout.cut, route, isinstance(content, Query))

    def start(self, asked: Asked) -> Future[Encoding]:
        """What `prepare` made, on its way; cancelling the future gives the request up, at the engine too."""
        return self._connection.start(partial(self._run, asked))

    def close(self) -> None:
        """Closes the connections to the engine."""
        self._connection.close()

    def __enter__(self) -> SGLangEncoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _one(self, content: Query | Item, route: Route) -> Encoding:
        return await self._run(await asyncio.to_thread(self.prepare, content, route))

    async def _run(self, asked: Asked) -> Encoding:
        if asked.route != "direct":
            return self._told(await self._write(asked), asked)
        reply = await self._generate(asked, (), 1, probability=asked.probability)
        probability = reply.emb_probability if asked.probability else 1.0
        return self._told(Encoding(_unit(reply.state), "direct", "", 0, probability, False), asked)

    def _told(self, encoding: Encoding, asked: Asked) -> Encoding:
        limit = self.model.settings.max_text_tokens
        return replace(encoding, cut=asked.cut, text_limit=limit) if asked.cut else encoding

    async def _write(self, asked: Asked) -> Encoding:
        """Lets the model write until `<|emb|>`, the end of its turn, or the budget, as `Encoder` does.

        One request does, except in two cases that go on with a second one, whose prompt ends in what was written so far: under
        `reason` a bypass is replaced by the second likeliest token, and an end of the turn at the first step, or a stop token of
        the engine's that is none of ours, is read like any other token. The engine's own switch `min_new_tokens` would spare the
        former, but it forbids all stop tokens, hides P(`<|emb|>`), and counts anew for a request that the engine took back.
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
                return self._encoding(whole[:-1], reply.state, probability, None)
            if not reply.stopped or len(whole) > self.budget or (whole[-1] == turn_end and len(whole) > 1):
                state = await self._close(asked, whole[:-1]) if self.model.settings.closing else reply.state
                return self._encoding(whole[:-1], state, probability, "turn" if whole[-1] == turn_end else "budget")
            written = whole

    async def _close(self, asked: Asked, written: tuple[int, ...]) -> Vector:
        """It stopped short of `<|emb|>`: the state behind the trained closing text, by a request of its own."""
        closing = tuple(self.model.processor.plain_ids(self.model.settings.closing))
        return (await self._generate(asked, written + closing, 1, probability=False)).state

    def _encoding(self, written: tuple[int, ...], state: Vector, probability: float, ended: Ended) -> Encoding:
        road: TakenRoute = "reason" if written else "direct"
        text = self.model.processor.decode(written)
        return Encoding(_unit(state), road, text, len(written), probability, ended is not None, ended=ended)

    async def _generate(self, asked: Asked, written: tuple[int, ...], most: int, *, probability: bool) -> _Reply:
        body = self._body(asked, written, most, probability)
        for attempt in range(1, self._connection.tries + 1):
            answer = await self._connection.request("POST", "/generate", body, refused=(400, 404, 422))
            if answer.status > 299:
                raise ModelError(self._refusal(answer.status, answer.said))
            try:
                return self._read(answer.body, asked.read + written, probability)
            except TransientError:
                if attempt == self._connection.tries:
                    raise
                await asyncio.sleep(self._connection.pause_s * 2 ** (attempt - 1))
        raise AssertionError("unreachable")

    def _body(self, asked: Asked, written: tuple[int, ...], most: int, probability: bool) -> dict[str, Any]:
        """The request. `last` and never `true`: the full form misplaces rows after a prefill in chunks."""
        emb = self.model.processor.emb_id
        body: dict[str, Any] = {
            "input_ids": [*asked.ids, *written],
            "sampling_params": self._sampling(most, emb),
            "return_hidden_states": "last",
            "stream": False,
        }
        if asked.images:
            body |= {"image_data": list(asked.images), "return_prompt_token_ids": True}
        if probability:
            body |= {"return_logprob": True, "token_ids_logprob": [emb], "top_logprobs_num": 2}
        return body

    def _sampling(self, most: int, emb: int) -> dict[str, Any]:
        """Greedy in every field: a server fills what is left out from its own preferred sampling."""
        return {
            "max_new_tokens": most,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 1,
            "min_p": 0.0,
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "repetition_penalty": 1.0,
            "min_new_tokens": 0,
            "n": 1,
            "ignore_eos": False,
            "stop_token_ids": [emb, self.model.processor.special[TURN_END]],
        }

    def _read(self, body: Any, read: tuple[int, ...], probability: bool) -> _Reply:
        """The reply's parts, each checked. Raises TransientError where the engine gave the request up for now."""
        if not isinstance(body, dict) or not isinstance(body.get("meta_info"), dict):
            raise self._wrong(f"answers with {str(body)[:120]!r}, which is no reply of SGLang's /generate")
        meta: dict[str, Any] = body["meta_info"]
        reason = meta.get("finish_reason")
        finish: dict[str, Any] = reason if isinstance(reason, dict) else {"type": reason}
        matched = finish.get("matched")
        if finish.get("type") == "abort":
            said = f"gave a request up: {finish.get('message')}"
            if finish.get("status_code") in (429, 503):
                raise TransientError(f"the engine at {self.address} {said}")
            raise self._wrong(said)
        if isinstance(matched, str):
            raise self._wrong(f"stopped with {matched!r} instead of a token; are its weights whole, is its precision right?")
        found = body.get("output_ids")
        ids = tuple(found) if isinstance(found, list) and all(isinstance(token, int) for token in found) else ()
        if isinstance(matched, int) and ids[-1:] != (matched,):
            ids += (matched,)  # a stop token that was trimmed
        if not ids:
            raise self._wrong("returned no output_ids; TraceIR needs an SGLang of 0.5.17 or later")
        self._check_read(body, meta, read)
        if self._weight_version != (version := str(meta.get("weight_version") or self._weight_version)):
            raise self._wrong(f"changed its weights to {version!r}; make a new encoder for the checkpoint that it serves now")
        first, others = _first_step(meta) if probability else (1.0, ())
        if probability and (math.isnan(first) or len(others) < 2):
            raise self._wrong("returned no log-probabilities; is a proxy between that drops them?")
        return _Reply(ids, self._state(meta.get("hidden_states")), finish.get("type") == "stop", first, others)

    def _state(self, found: Any) -> Vector:
        """The last row of whatever form came: [D] under `last`, else rows of steps, of which the first may be a whole prefill."""
        if not found:
            raise self._wrong(f"returned no hidden states; {_LAUNCH}")
        while isinstance(found, list) and found and isinstance(found[-1], list):
            found = found[-1]
        try:
            state = np.array(found, dtype=np.float32).ravel()
        except (TypeError, ValueError) as error:
            raise self._wrong(f"returned hidden states that are no numbers: {str(found)[:80]}") from error
        if len(state) != self.width:
            hint = "it joins several layers; launch it without a speculative algorithm" if len(state) % self.width == 0 else ""
            raise self._wrong(
                f"returned a state of {len(state)} components for a model of width {self.width}; {hint}".rstrip("; ")
            )
        if not np.isfinite(state).all() or not state.any():
            raise self._wrong("returned a state that is not finite or all zero; are its weights whole, is its precision right?")
        return state

    def _check_read(self, body: Mapping[str, Any], meta: Mapping[str, Any], read: tuple[int, ...]) -> None:
        """Holds the engine to our tokens. Where pictures stand, only their number counts: some releases put hashes there."""
        seen, pad = body.get("prompt_token_ids"), self.model.processor.special[IMAGE_PAD]
        count = len(seen) if isinstance(seen, list) else meta.get("prompt_tokens", len(read))
        same = count == len(read)
        if same and isinstance(seen, list):
            same = all(ours in (pad, theirs) for ours, theirs in zip(read, seen, strict=True))
        if not same:
            raise self._wrong(
                f"read a prompt of {count} tokens that is not TraceIR's of {len(read)}: it took a text apart anew or sized a "
                "picture otherwise; launch it with SGLANG_MM_AVOID_RETOKENIZE=1 and the checkpoint's own preprocessor_config.json"
            )

    def _check_model(self) -> str:
        """Asks which weights are served; returns their version as the engine calls it."""
        info = self._info("/model_info", "/get_model_info")
        if info is None:
            raise self._wrong("has no /model_info; is it an SGLang server?")
        if info.get("is_generation") is False:
            raise self._wrong("serves embeddings, which cannot write; launch it without --is-embedding")
        version, path = str(info.get("weight_version") or ""), str(info.get("model_path") or "")
        if version not in _UNNAMED:
            if version != self.fingerprint:
                raise self._other(f"weight version {version!r}")
            return version
        served = read_settings(Path(path, "traceir.json")) if path and Path(path, "traceir.json").is_file() else None
        if served is not None and served.fingerprint != self.fingerprint:
            raise self._other(f"{path}, whose fingerprint is {served.fingerprint!r}")
        if served is None and Path(path).name != Path(self._name).name:
            raise self._other(path)
        if served is None:
            log.warning("%s serves a model named %r; only the name could be compared, see docs/engines.md", self.address, path)
        return version

    def _check_server(self) -> None:
        """What its launch must and must not have switched on, as far as the engine tells."""
        info = self._info("/server_info", "/get_server_info")
        if info is None:
            return
        version = tuple(int(part) for part in re.findall(r"\d+", str(info.get("version", "")))[:3])
        if version and version < OLDEST:
            raise self._wrong(f"is SGLang {info['version']}; hidden states of mode `last` need 0.5.17 or later")
        if "return_hidden_states_mode" in info and info["return_hidden_states_mode"] not in ("last", "full"):
            raise self._wrong(f"was launched without hidden states; {_LAUNCH}")
        if str(info.get("speculative_algorithm") or "").upper() == "NGRAM":
            raise self._wrong("speculates by NGRAM, which returns states of other positions; launch it without")
        if info.get("speculative_algorithm"):
            log.warning("%s speculates (%s): not tested with TraceIR", self.address, info["speculative_algorithm"])
        if info.get("enable_deterministic_inference") is False:
            log.warning("%s is not deterministic: reasoning may depend on what else it computes at the time", self.address)

    def _info(self, *paths: str) -> dict[str, Any] | None:
        for path in paths:
            answer = self._connection.call("GET", path, refused=(404, 405))
            if isinstance(answer.body, dict):
                return answer.body
        return None

    def _refusal(self, status: int, said: str) -> str:
        remedy = "is it an SGLang server?" if status == 404 else "see the engine's log"
        if "hidden state" in said:
            remedy = _LAUNCH
        elif "context length" in said:
            remedy = "raise its --context-length, or lower max_text_tokens or the picture's size"
        return f"the engine at {self.address} refuses a request ({status}: {said}); {remedy}"

    def _other(self, served: str) -> ModelError:
        return self._wrong(
            f"serves {served}, not {self._name} (fingerprint {self.fingerprint!r}); give the model it serves, or launch it with "
            f"--weight-version {self.fingerprint} if it is the same"
        )

    def _wrong(self, what: str) -> ModelError:
        return ModelError(f"the engine at {self.address} {what}")


def without_weights(source: str | Path) -> TraceModel:
    """A checkpoint's tokenizer, picture settings and traceir.json as a TraceModel that renders and lays out, and cannot run.

    Raises ModelError where an engine could not serve what is asked: adapters, profiles, a read-out at the token itself.
    """
    from transformers import AutoConfig, AutoTokenizer

    name = str(source)
    try:
        local = fetch(name, weights=False)
        settings = read_settings(local / "traceir.json") if (local / "traceir.json").is_file() else None
        if settings is None or not (local / "config.json").is_file():
            raise ModelError(f"{name} has no config.json with traceir.json; an engine serves whole checkpoints: `traceir merge`")
        config = AutoConfig.from_pretrained(local, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(local, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {name}: {error}") from error
    if config.model_type not in NETWORKS or settings.profile is not None or settings.pooling_position == "at_token":
        raise ModelError(
            f"{name} ({config.model_type}, read {settings.pooling_position}) cannot be encoded by an engine: it gives the state "
            "before a token and knows no profiles; encode it in this process"
        )
    if not settings.fingerprint:
        raise ModelError(f"{name}: traceir.json names no fingerprint; save the checkpoint again by this release")
    preprocessor = local / "preprocessor_config.json"
    image = image_budget(preprocessor if preprocessor.is_file() else None, config)
    processor = Processor(tokenizer, image, pooling_position=settings.pooling_position, max_text_tokens=settings.max_text_tokens)
    return TraceModel(SimpleNamespace(config=config), processor, settings)


def _images(prompt: Prompt, layout: Layout, processor: Processor) -> tuple[str, ...]:
    return tuple(_data_url(image, pixels, processor) for image, pixels in zip(prompt.images, layout.pixels, strict=True))


def _data_url(image: ImageInput, pixels: Pixels, processor: Processor) -> str:
    """The picture as PNG, at the size the model sees, so that the engine has nothing to resize.

    Where Qwen's rule would resize even that (budgets whose least and greatest area almost meet) the picture goes as it is.
    """
    height, width = pixels.shape[:2]
    settled = smart_resize(height, width, processor.image) == (height, width)
    packed = BytesIO()
    (Image.fromarray(pixels) if settled else image.load()).save(packed, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()


def _folded(ids: Sequence[int], pad: int) -> tuple[int, ...]:
    """Token ids with each run of image tokens as one."""
    return tuple(token for place, token in enumerate(ids) if token != pad or place == 0 or ids[place - 1] != pad)


def _first_step(meta: Mapping[str, Any]) -> tuple[float, tuple[int, ...]]:
    """P(`<|emb|>`) at the first step, NaN where it is missing, and the likeliest tokens there, best first."""
    try:
        chance = math.exp(float(meta["output_token_ids_logprobs"][0][0][0]))
        return chance, tuple(int(entry[1]) for entry in meta["output_top_logprobs"][0])
    except (KeyError, IndexError, TypeError, ValueError):
        return math.nan, ()


def _unit(state: Vector) -> Vector:
    return state / np.linalg.norm(state)
