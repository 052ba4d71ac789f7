"""What servers of `/v1/embeddings` take: OpenAI's request is for texts alone, and each that takes pictures has its own form.

A form is chosen by name, as `--engine FORM:URL`; nothing is guessed, since most servers ignore what they do not know, and a
picture they ignored would pass for one they saw. Read from the sources and documents of: vLLM
(entrypoints/pooling/base/protocol.py, examples/pooling/embed/vision_embedding_online.py), Infinity 0.0.77
(fastapi_schemas/pymodels.py), text-embeddings-inference (router/src/http/types.rs), SGLang (entrypoints/openai/protocol.py), and
Jina's interface as its clients use it. Imports nothing heavy.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from traceir.errors import InputError
from traceir.suggest import did_you_mean

Role = Literal["query", "candidate"]
QWEN_INSTRUCTION: Final = "Represent the user's input."
"""What Qwen3-VL-Embedding reads where no instruction is given, for queries and candidates alike."""
_BEHIND_VLLM: Final = (("qwen3-vl-embedding", "qwen3-vl"), ("siglip", "siglip"), ("clip", "clip"))
"""Parts of names of models whose vectors depend on more than a chat, and the form of each behind vLLM."""
_FLOATS: Final[Mapping[str, Any]] = MappingProxyType({"encoding_format": "float"})
_ENGINE: Final = re.compile(r"([A-Za-z][\w.+-]*):(https?://.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Text:
    """One text of an input, as it was typed."""

    text: str


@dataclass(frozen=True, slots=True)
class Image:
    """One picture of an input, as a data URL."""

    url: str


@dataclass(frozen=True, slots=True)
class Said:
    """One input as it is sent: its parts in reading order, and what is asked of it ("": nothing)."""

    role: Role
    instruction: str
    parts: tuple[Text | Image, ...]

    @property
    def words(self) -> str:
        """Instruction and texts as one text, for the forms that have no place of their own for an instruction."""
        texts = [self.instruction, *(part.text for part in self.parts if isinstance(part, Text))]
        return " ".join(text.strip() for text in texts if text.strip())

    @property
    def images(self) -> tuple[str, ...]:
        return tuple(part.url for part in self.parts if isinstance(part, Image))


Takes = Literal["texts", "one", "pair", "any"]


@dataclass(frozen=True, slots=True)
class Form:
    """One form of request.

    `takes`: texts alone; a text or a picture; at most one of each; any sequence of both. `tell` gives an input as JSON. `fields`
    gives what a request states once, so that inputs of different fields never share one. `texts` and `pictures` are how many
    inputs a request holds at most, those with pictures counted apart.
    """

    name: str
    takes: Takes
    tell: Callable[[Said], Any]
    fields: Callable[[Said], Mapping[str, Any]]
    texts: int = 32
    images: int = 8

    def check(self, texts: int, images: int) -> None:
        """Raises InputError for an input of so many texts and pictures that this form has no place for."""
        if self.takes == "texts" and images:
            raise InputError(
                f"the form `{self.name}` of requests is for texts alone; for a server that takes pictures write one of "
                f"{', '.join(f'{form.name}:URL' for form in FORMS.values() if form.takes != 'texts')} (docs/engines.md)"
            )
        if (self.takes == "one" and texts and images) or (self.takes in ("one", "pair") and images > 1):
            most = "a text or one picture" if self.takes == "one" else "one picture beside one text"
            raise InputError(
                f"it has {images} picture(s) and {texts} text(s), an instruction counted; an input of the form `{self.name}` "
                f"has place for {most}"
            )

    def body(self, told: list[Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """A request without the model's name: a conversation, which is a list, as `messages`, all else under `input`."""
        return {**({"messages": told[0]} if isinstance(told[0], list) else {"input": told}), **fields}


def split_engine(text: str) -> tuple[str | None, str]:
    """Form and address of `FORM:URL`; None where there is no form before it. Raises InputError for an unknown form."""
    found = _ENGINE.fullmatch(text)
    if found is None:
        return None, text
    if found[1] not in FORMS:
        raise InputError(
            f"engine {text[:200]!r}: the form {found[1]!r} is unknown{did_you_mean(found[1], FORMS)}; write one of "
            f"{', '.join(f'{name}:URL' for name in FORMS)} for an endpoint of embeddings, or the URL alone for SGLang"
        )
    return found[1], found[2]


def form_for(name: str, model: str) -> Form:
    """The form of a name; behind vLLM, that of the model where it has one of its own, which its vectors depend on."""
    if name not in FORMS:
        raise InputError(f"the form {name!r} is unknown{did_you_mean(name, FORMS)}; give one of {', '.join(FORMS)}")
    own = [form for part, form in _BEHIND_VLLM if part in model.lower()] if name == "vllm" else []
    return FORMS[own[0] if own else name]


def _floats(_: Said) -> Mapping[str, Any]:
    return _FLOATS


def _words(said: Said) -> str:
    return said.words


def _object(said: Said) -> dict[str, str]:
    return {name: value for name, value in (("text", said.words), ("image", "".join(said.images))) if value}


def _input_type(said: Said) -> Mapping[str, Any]:
    return {**_FLOATS, "input_type": "query" if said.role == "query" else "document"}


def _jina_fields(said: Said) -> Mapping[str, Any]:
    task = "retrieval.query" if said.role == "query" else "retrieval.passage"
    return {"task": task, "normalized": True, "embedding_type": "float"}


def _text_or_uri(said: Said) -> str:
    return said.images[0] if said.images else said.words


def _modality(said: Said) -> Mapping[str, Any]:
    return {**_FLOATS, "modality": "image" if said.images else "text"}


def _contents(said: Said) -> list[dict[str, Any]]:
    return [
        {"type": "image_url", "image_url": {"url": part.url}} if isinstance(part, Image) else {"type": "text", "text": part.text}
        for part in said.parts
    ]


def _chat(said: Said) -> list[dict[str, Any]]:
    """The instruction, where there is one, as the system's turn; alone it is the user's, since a chat needs one."""
    if not said.parts:
        return [{"role": "user", "content": [{"type": "text", "text": said.instruction}]}]
    system = [{"role": "system", "content": [{"type": "text", "text": said.instruction}]}] if said.instruction else []
    return [*system, {"role": "user", "content": _contents(said)}]


def _qwen_chat(said: Said) -> list[dict[str, Any]]:
    """As Qwen's own script lays it out: always a system's turn, its last character a punctuation mark, and an open answer."""
    instruction = said.instruction.strip() or QWEN_INSTRUCTION
    if not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    content = _contents(said) or [{"type": "text", "text": "NULL"}]
    return [
        {"role": "system", "content": [{"type": "text", "text": instruction}]},
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": ""}]},
    ]


def _open_answer(_: Said) -> Mapping[str, Any]:
    """What vLLM needs to end the prompt as Qwen's script does: behind the assistant's opening, by the tokenizer's last token."""
    return {**_FLOATS, "continue_final_message": True, "add_special_tokens": True}


def _text_or_chat(said: Said) -> str | list[dict[str, Any]]:
    """A text by itself, since vLLM's tokenizer ends it as CLIP needs it there and not in a chat."""
    return _chat(said) if said.images else said.words


def _padded(said: Said) -> Mapping[str, Any]:
    """SigLIP learnt from texts of full length; vLLM pads them where it is asked to."""
    return _FLOATS if said.images else {**_FLOATS, "padding": "max_length"}


FORMS: Final[Mapping[str, Form]] = MappingProxyType(
    {
        form.name: form
        for form in (
            Form("openai", "texts", _words, _floats),
            Form("vllm", "any", _chat, _floats, texts=1, images=1),
            Form("qwen3-vl", "any", _qwen_chat, _open_answer, texts=1, images=1),
            Form("clip", "one", _text_or_chat, _floats, images=1),
            Form("siglip", "one", _text_or_chat, _padded, images=1),
            Form("infinity", "one", _text_or_uri, _modality),
            Form("objects", "pair", _object, _input_type),
            Form("jina", "one", _object, _jina_fields),
        )
    }
)
