"""What a model reads for a query and for a candidate, and what it should write: the only home of special tokens and templates.

A Prompt is a sequence of text spans and images. Special tokens are read in the template's part of a span and never in the user's,
so a caption that holds `<|emb|>` or `<|im_start|>` is harmless. The two versions share Qwen's chat layout:

- `trace-1` follows the paper (section 3, prompts): a system message with role, modality, strategy and output rules.
- `brief-1` says the same in a handful of words, for small models whose compute is counted in prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from traceir.images import ImageInput
from traceir.items import Item, Part, Query

EMB: Final = "<|emb|>"
PAD: Final = "<|endoftext|>"
TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"
VISION_START: Final = "<|vision_start|>"
VISION_END: Final = "<|vision_end|>"
IMAGE_PAD: Final = "<|image_pad|>"
VIDEO_PAD: Final = "<|video_pad|>"
SPECIAL_TOKENS: Final = (PAD, TURN_START, TURN_END, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)

PromptVersion = Literal["trace-1", "brief-1"]
Role = Literal["query", "candidate"]


@dataclass(frozen=True, slots=True)
class UserText:
    """Text from outside: tokenised without special tokens, and the only text that a token budget may cut.

    `dropped` is what a limit of characters has cut off it already.
    """

    text: str
    dropped: str = ""


@dataclass(frozen=True, slots=True)
class Span:
    """Text that is tokenised as one, because a tokenizer's merges cross the border between template (str) and user text."""

    parts: tuple[str | UserText, ...]

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)


Piece = Span | ImageInput


@dataclass(frozen=True, slots=True)
class Prompt:
    """All that the model reads before it writes. `role` decides whether it may reason: candidates never do.

    `closed`: the prompt ends at its own pooling position (profiles.py), so nothing is put or written behind it. `max_tokens` cuts
    the whole on the right, template included, as a tokenizer's truncation does; never an image.
    """

    pieces: tuple[Piece, ...]
    role: Role
    version: str
    closed: bool = False
    max_tokens: int | None = None

    @property
    def images(self) -> tuple[ImageInput, ...]:
        return tuple(piece for piece in self.pieces if isinstance(piece, ImageInput))

    def show(self) -> str:
        """The prompt as one readable string; images stand as `[image NAME]`."""
        return "".join(piece.text if isinstance(piece, Span) else f"[image {piece.name}]" for piece in self.pieces)


_NOUN: Final[Mapping[str, str]] = {
    "text": "a text",
    "image": "an image",
    "image,text": "an image together with a text",
    "any": "an item of any modality",
}
_STRATEGY: Final[Mapping[str, Mapping[str, str]]] = {
    "text": {
        "image": "Attend to the objects, attributes and places that the text names and that a picture would show.",
        "text": "Attend to what the question asks for and to the facts a passage must hold to answer it.",
        "image,text": "Attend to what the picture must show and to what the words beside it must say.",
    },
    "image": {
        "text": "Attend to the main objects, their attributes and relations, and the event shown.",
        "image": "Attend to layout, objects and fine detail that set near-identical pictures apart.",
    },
    "image,text": {
        "text": "Recognise the entity in the image, then work out step by step what the question asks about it.",
        "image": "Name the source state, the change the text asks for, and what must stay the same.",
        "image,text": "Recognise the entity in the image, then work out which entity and facts are sought.",
    },
}
"""By the modality of the query and of what it looks for."""
_ANY_STRATEGY: Final = "Attend to whatever identifies the item sought."


def render_query(query: Query, version: PromptVersion) -> Prompt:
    """The prompt of a query: role, modality, strategy and output rules, then instruction, images and text in their order."""
    target = query.target or "any"
    strategy = _STRATEGY[query.modality].get(target, _ANY_STRATEGY)
    system = (
        f"You are a multimodal retrieval encoder. The input is a query: {_NOUN[query.modality]}. It looks for "
        f"{_NOUN[target]}. {strategy} If the query is simple, output only the embedding token. If it is complex, first "
        "write a concise description of the target, then the embedding token. Write nothing after it."
    )
    brief = f"query {query.modality.replace(',', ' ')} find {target.replace(',', ' ')}. "
    return _prompt("query", version, system, brief, query.parts, query.instruction)


def render_candidate(item: Item, version: PromptVersion) -> Prompt:
    """The prompt of a candidate: role, modality and output rules, then its images and text. Candidates never reason."""
    system = (
        f"You are a multimodal retrieval encoder. The input is a candidate: {_NOUN[item.modality]}. Attend to everything "
        "that a query could ask of it. Output only the embedding token."
    )
    return _prompt("candidate", version, system, f"candidate {item.modality.replace(',', ' ')}. ", item.parts)


def _prompt(
    role: Role, version: PromptVersion, system: str, brief: str, parts: tuple[Part, ...], instruction: str | None = None
) -> Prompt:
    return Prompt((*opening(version, system, brief), *contents(parts, instruction), *ENDING), role, version)


def opening(version: PromptVersion, system: str, brief: str) -> list[Piece]:
    """What stands before the contents: the long form or the brief one."""
    user = f"{TURN_START}user\n"
    texts = (f"{TURN_START}system\n", system, f"{TURN_END}\n", user) if version == "trace-1" else (user, brief)
    return [Span((text,)) for text in texts]


def contents(parts: tuple[Part, ...], instruction: str | None = None) -> list[Piece]:
    """Each text a span of its own: no merge of the tokenizer crosses from one to the next."""
    pieces: list[Piece] = []
    if instruction := normalise(instruction):
        pieces.append(Span((UserText(instruction + "\n"),)))
    for part in parts:
        if isinstance(part, ImageInput):
            pieces += [Span((VISION_START,)), part, Span((VISION_END,))]
        elif text := normalise(part):
            pieces.append(Span((UserText(text),)))
    return pieces


ENDING: Final = (Span((f"{TURN_END}\n",)), Span((f"{TURN_START}assistant\n",)))


def normalise(text: str | None) -> str:
    """M-BEIR's text form: no carriage returns, outer blanks or quotation marks; a capital first, a full stop last.

    Every text passes through it on its way into a prompt, so that training, evaluation and search read the same form.
    """
    kept = (text or "").replace("\r", "").strip().strip('"')
    if not kept:
        return ""
    return kept[0].upper() + kept[1:] + ("" if kept[-1] in ".?!" else ".")


def completion_text(reasoning: str | None, answer: str | None) -> str:
    """What a query's model should write before `<|emb|>`: reasoning and answer without their tags (paper, section 2).

    A reasoning that does not end in punctuation is set off from the answer by "; ".
    """
    parts = [part.strip() for part in (reasoning, answer) if part and part.strip()]
    if len(parts) == 2 and parts[0][-1] not in ".;:!?":
        return "; ".join(parts)
    return " ".join(parts)
