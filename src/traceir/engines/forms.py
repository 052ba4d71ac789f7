"""What servers of `/v1/embeddings` take: OpenAI's request is for texts alone, and each that takes images has its own form.

A form is chosen by name, as `--engine FORM:URL`; nothing is guessed, since most servers ignore what they do not know, and an
image they ignored would pass for one they saw. Read from the sources and documents of: vLLM
(entrypoints/pooling/base/protocol.py, examples/pooling/embed/vision_embedding_online.py), Infinity 0.0.77
(fastapi_schemas/pymodels.py), text-embeddings-inference (router/src/http/types.rs), SGLang (entrypoints/openai/protocol.py), and
Jina's interface as its clients use it. Imports nothing heavy.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from traceir.errors import InputError
from traceir.suggest import did_you_mean

if TYPE_CHECKING:
    from traceir.images import ImageInput

Role = Literal["query", "candidate"]
Json = dict[str, Any]
QWEN_INSTRUCTION: Final = "Represent the user's input."
"""What Qwen3-VL-Embedding reads where no instruction is given, for queries and candidates alike."""
_BEHIND_VLLM: Final = (("qwen3-vl-embedding", "qwen3-vl"), ("siglip", "siglip"), ("clip", "clip"))
"""Parts of names of models whose vectors depend on more than a chat, and the form of each behind vLLM."""
_ENGINE: Final = re.compile(r"([A-Za-z][\w.+-]*):(https?://.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class EngineInput:
    """One input as it is sent: its parts in reading order, texts and data URLs as OpenAI's chat has them; "": no instruction."""

    role: Role
    instruction: str
    parts: tuple[Json, ...]

    @property
    def words(self) -> str:
        """Instruction and texts as one text, for the forms that have no place of their own for an instruction."""
        texts = [self.instruction, *(part["text"] for part in self.parts if part["type"] == "text")]
        return " ".join(text.strip() for text in texts if text.strip())

    @property
    def image(self) -> str:
        """The first image, "" where there is none."""
        return next((str(part["image_url"]["url"]) for part in self.parts if part["type"] == "image_url"), "")


def content_parts(parts: Iterable[str | ImageInput], url_of: Callable[[ImageInput], str]) -> list[Json]:
    """Texts and images as OpenAI's chat has them."""
    return [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image_url", "image_url": {"url": url_of(part)}}
        for part in parts
    ]


def message(role: str, content: str | Iterable[Json]) -> Json:
    """A message of a chat, of one text or of parts."""
    return {"role": role, "content": [{"type": "text", "text": content}] if isinstance(content, str) else list(content)}


def _object(content: EngineInput) -> Json:
    return {name: value for name, value in (("text", content.words), ("image", content.image)) if value}


def _text_or_uri(content: EngineInput) -> str:
    return content.image or content.words


def _chat(content: EngineInput) -> list[Json]:
    """The instruction, where there is one, as the system's message; alone it is the user's, since a chat needs one."""
    system = [message("system", content.instruction)] if content.parts and content.instruction else []
    return [*system, message("user", content.parts or content.instruction)]


def _qwen_chat(content: EngineInput) -> list[Json]:
    """As Qwen's own script lays it out: always a system's message that ends in a punctuation mark, and an open answer."""
    instruction = content.instruction.strip() or QWEN_INSTRUCTION
    if not unicodedata.category(instruction[-1]).startswith("P"):
        instruction += "."
    return [message("system", instruction), message("user", content.parts or "NULL"), message("assistant", "")]


def _text_or_chat(content: EngineInput) -> str | list[Json]:
    """A text by itself, since vLLM's tokenizer ends it as CLIP needs it there and not in a chat."""
    return _chat(content) if content.image else content.words


@dataclass(frozen=True, slots=True)
class Form:
    """One form of request.

    `takes`: texts alone; a text or an image; at most one of each; any sequence of both. `tell` gives an input as JSON. `fields`
    are what a request states once, by what it is for: every one, those of a role, those with or without an image; inputs of
    different fields never share a request. `texts` and `images` are the most inputs of a request, by whether they have images.
    """

    name: str
    takes: Literal["texts", "one", "pair", "any"]
    tell: Callable[[EngineInput], Any]
    fields: Mapping[str, Json]
    texts: int = 32
    images: int = 8

    def refusal(self, texts: int, images: int) -> str:
        """Why this form has no place for an input of so many texts and images; "" where it has."""
        if self.takes == "texts" and images:
            others = ", ".join(f"{form.name}:URL" for form in FORMS.values() if form.takes != "texts")
            return f"the form `{self.name}` is for texts alone; for a server that takes images write one of {others}"
        if (self.takes == "one" and texts and images) or (self.takes in ("one", "pair") and images > 1):
            most = "a text or one image" if self.takes == "one" else "one image beside one text"
            count = f"{images} image(s) and {texts} text(s), an instruction counted"
            return f"it has {count}; an input of the form `{self.name}` has place for {most}"
        return ""

    def fields_of(self, content: EngineInput) -> Json:
        """What the request of an input states once."""
        kinds = ("every", content.role, "image" if content.image else "text")
        return {name: value for kind in kinds for name, value in self.fields.get(kind, {}).items()}


_FLOATS: Final[Json] = {"encoding_format": "float"}
_PLAIN: Final = {"every": _FLOATS}
# Ends the prompt as Qwen's script does: behind the assistant's opening, by the tokenizer's last token.
_OPEN: Final = {"every": {**_FLOATS, "continue_final_message": True, "add_special_tokens": True}}
_PADDED: Final = {**_PLAIN, "text": {"padding": "max_length"}}  # SigLIP learnt from texts of full length
_MODALITY: Final = {**_PLAIN, "image": {"modality": "image"}, "text": {"modality": "text"}}
_INPUT_TYPE: Final = {**_PLAIN, "query": {"input_type": "query"}, "candidate": {"input_type": "document"}}
_TASK: Final[Mapping[str, Json]] = {
    "every": {"normalized": True, "embedding_type": "float"},
    "query": {"task": "retrieval.query"},
    "candidate": {"task": "retrieval.passage"},
}
_FORMS: Final = (
    Form("openai", "texts", _text_or_uri, _PLAIN),
    Form("vllm", "any", _chat, _PLAIN, texts=1, images=1),
    Form("qwen3-vl", "any", _qwen_chat, _OPEN, texts=1, images=1),
    Form("clip", "one", _text_or_chat, _PLAIN, images=1),
    Form("siglip", "one", _text_or_chat, _PADDED, images=1),
    Form("infinity", "one", _text_or_uri, _MODALITY),
    Form("objects", "pair", _object, _INPUT_TYPE),
    Form("jina", "one", _object, _TASK),
)
FORMS: Final[Mapping[str, Form]] = {form.name: form for form in _FORMS}


def split_engine(text: str) -> tuple[str | None, str]:
    """Form and address of `FORM:URL`; None where there is no form before it. Raises InputError for an unknown form."""
    match = _ENGINE.fullmatch(text)
    if match is None:
        return None, text
    if match[1] not in FORMS:
        raise InputError(
            f"engine {text[:200]!r}: the form {match[1]!r} is unknown{did_you_mean(match[1], FORMS)}; write one of "
            f"{', '.join(f'{name}:URL' for name in FORMS)} for an endpoint of embeddings, or the URL alone for SGLang"
        )
    return match[1], match[2]


def form_for(name: str, model: str) -> Form:
    """The form of a name; behind vLLM, that of the model where it has one of its own, which its vectors depend on."""
    if name not in FORMS:
        raise InputError(f"the form {name!r} is unknown{did_you_mean(name, FORMS)}; give one of {', '.join(FORMS)}")
    own = [form for part, form in _BEHIND_VLLM if part in model.lower()] if name == "vllm" else []
    return FORMS[own[0] if own else name]
