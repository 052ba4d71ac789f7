"""The only home of special tokens and templates: what a model reads for a query and for a candidate, and what it should write.

A Prompt is a sequence of pieces: literal text, special tokens, pictures. Text that comes from users is never parsed for special
tokens, so a caption that holds `<|emb|>` or `<|im_start|>` is harmless. The two styles share one chat layout (Qwen's):

- `trace-1` follows the paper (section 3, prompts): a system turn with role, modality, strategy and output rules.
- `brief-1` says the same in a handful of words, for small models whose compute is counted in prompt tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from traceir.errors import InputError
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
PROMPT_VERSIONS: Final[tuple[PromptVersion, ...]] = ("trace-1", "brief-1")
Role = Literal["query", "candidate"]


@dataclass(frozen=True, slots=True)
class Special:
    """One special token, by name."""

    token: str


@dataclass(frozen=True, slots=True)
class UserText:
    """Text from outside: tokenised without special tokens, and the only piece that a token budget may cut.

    `dropped` is what a limit of characters has cut off it already.
    """

    text: str
    dropped: str = ""


@dataclass(frozen=True, slots=True)
class Joined:
    """Template and user text side by side, tokenised as one text, because a tokenizer's merges cross the border between them.

    Special tokens are read in the template's parts (str) and never in the user's (UserText).
    """

    parts: tuple[str | UserText, ...]


Piece = str | Special | UserText | Joined | ImageInput


@dataclass(frozen=True, slots=True)
class Prompt:
    """All that the model reads before it writes. `role` decides whether it may reason: candidates never do.

    `closed`: the prompt ends at its own read-out (profiles.py), so nothing is put or written behind it. `max_tokens` cuts the
    whole on the right, template included, as a tokenizer's truncation does; never a picture.
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
        """The prompt as one readable string; pictures stand as `[picture NAME]`."""
        return "".join(_show(piece) for piece in self.pieces)


def _show(piece: Piece) -> str:
    if isinstance(piece, Special):
        return piece.token
    if isinstance(piece, UserText):
        return piece.text
    if isinstance(piece, Joined):
        return "".join(part.text if isinstance(part, UserText) else part for part in piece.parts)
    return piece if isinstance(piece, str) else f"[picture {piece.name}]"


_NOUN: Final[dict[str, str]] = {
    "text": "a text",
    "image": "an image",
    "image,text": "an image together with a text",
    "any": "an item of any modality",
}
_STRATEGY: Final[dict[tuple[str, str], str]] = {
    (
        "text",
        "image",
    ): "Attend to the objects, attributes and places that the text names and that a picture would show.",
    ("text", "text"): "Attend to what the question asks for and to the facts a passage must hold to answer it.",
    ("text", "image,text"): "Attend to what the picture must show and to what the words beside it must say.",
    ("image", "text"): "Attend to the main objects, their attributes and relations, and the event shown.",
    ("image", "image"): "Attend to layout, objects and fine detail that set near-identical pictures apart.",
    (
        "image,text",
        "text",
    ): "Recognise the entity in the image, then work out step by step what the question asks about it.",
    ("image,text", "image"): "Name the source state, the change the text asks for, and what must stay the same.",
    ("image,text", "image,text"): "Recognise the entity in the image, then work out which entity and facts are sought.",
}


def render_query(query: Query, version: PromptVersion) -> Prompt:
    """The prompt of a query: role, modality, strategy and output rules, then instruction, pictures and text in their order."""
    target = query.target or "any"
    if version == "trace-1":
        strategy = _STRATEGY.get((query.modality, target), "Attend to whatever identifies the item sought.")
        system = (
            f"You are a multimodal retrieval encoder. The input is a query: {_NOUN[query.modality]}. It looks for "
            f"{_NOUN[target]}. {strategy} If the query is simple, output only the embedding token. If it is complex, first "
            "write a concise description of the target, then the embedding token. Write nothing after it."
        )
        opening: tuple[Piece, ...] = (*_turn("system", system), *_open("user"))
    else:
        words = f"query {query.modality.replace(',', ' ')} find {target.replace(',', ' ')}."
        opening = (*_open("user"), words + " ")
    instruction = [UserText(normalise(query.instruction) + "\n")] if normalise(query.instruction) else []
    return _finish(opening, (*instruction, *_body(query.parts)), "query", version)


def render_candidate(item: Item, version: PromptVersion) -> Prompt:
    """The prompt of a candidate: role, modality and output rules, then its pictures and text. Candidates never reason."""
    if version == "trace-1":
        system = (
            f"You are a multimodal retrieval encoder. The input is a candidate: {_NOUN[item.modality]}. Attend to everything "
            "that a query could ask of it. Output only the embedding token."
        )
        opening: tuple[Piece, ...] = (*_turn("system", system), *_open("user"))
    else:
        opening = (*_open("user"), f"candidate {item.modality.replace(',', ' ')}. ")
    return _finish(opening, _body(item.parts), "candidate", version)


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


def check_version(version: str) -> PromptVersion:
    for known in PROMPT_VERSIONS:
        if version == known:
            return known
    raise InputError(f"prompt version {version!r} is unknown; this release has {', '.join(PROMPT_VERSIONS)}")


def _finish(opening: tuple[Piece, ...], body: tuple[Piece, ...], role: Role, version: PromptVersion) -> Prompt:
    closing: tuple[Piece, ...] = (Special(TURN_END), "\n", *_open("assistant"))
    return Prompt((*opening, *body, *closing), role, version)


def _open(who: str) -> tuple[Piece, ...]:
    return (Special(TURN_START), f"{who}\n")


def _turn(who: str, text: str) -> tuple[Piece, ...]:
    return (*_open(who), text, Special(TURN_END), "\n")


def _body(parts: tuple[Part, ...]) -> tuple[Piece, ...]:
    pieces: list[Piece] = []
    for part in parts:
        if isinstance(part, ImageInput):
            pieces += [Special(VISION_START), part, Special(VISION_END)]
        elif normalise(part):
            pieces.append(UserText(normalise(part)))
    return tuple(pieces)
