"""Profiles: how checkpoints of other projects are prompted and read, as data instead of code.

A profile holds one template for queries and one for candidates, and says where the embedding is read: before a token, at a token,
or at the last token of the prompt; whether that token stands in the template or the model writes it; and who may write.
A user's own profile is a JSON file with the same fields (docs/third-party.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from string import Formatter
from typing import Any, Final, get_args

from PIL import Image

from traceir.batch import PoolingPosition, Resize, Rope
from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.items import MODALITIES, Item, Query
from traceir.prompts import VISION_END, VISION_START, Piece, Prompt, Role, Span, UserText, normalise
from traceir.suggest import did_you_mean

PLACEHOLDERS: Final = ("images", "text", "instruction", "asked", "kind")
JSON_KEYS: Final = {"pooling_position": "read_out", "blank_image": "blank_picture"}
"""Fields that have another name in files."""


@dataclass(frozen=True, slots=True)
class Profile:
    """One way to prompt and to read a checkpoint.

    Templates are the whole text the model reads, special tokens included, with placeholders: `{images}` all images, `{text}`,
    `{instruction}`, `{asked}` instruction and text in one, `{kind}` the one of `words` that names what stands there (text, image,
    image with text). What users write is never read as a special token. A side that shows no image is given a white one under
    `blank_image`.

    A side in `writes` goes on writing until it writes `token`, and under `writes_on` to the end of its turn, where the last
    `token` counts. Any other is embedded in one pass: at the first `direct_token` of its template; where there is none, at its
    first `token` under `at_token`, just before that under `before_token`, and at the last token of all under `last`. A side that
    may write but shall not is read at `direct_token` too, else behind its prompt. `add_token`: a tokenizer that lacks `token` is
    given it, whose row the model has.

    `instruction` fills `{instruction}` where a query has none, and for candidates. `normalise` puts texts into M-BEIR's form.
    `max_query_tokens` and `max_candidate_tokens` cut the whole prompt on the right, `max_text_tokens` what users wrote, and
    `max_text_chars` each of their texts. Budgets that are None stay the checkpoint's. Vectors always have unit length.
    """

    name: str
    query: str
    candidate: str
    pooling_position: PoolingPosition = "last"
    token: str | None = None
    writes: tuple[Role, ...] = ()
    direct_token: str | None = None
    words: tuple[str, str, str] = ("text", "image", "image and text")
    instruction: str = ""
    normalise: bool = False
    blank_image: bool = False
    writes_on: bool = False
    add_token: bool = False
    rope: Rope = "mrope"
    resize: Resize = "processor"
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_text_chars: int | None = None
    max_text_tokens: int | None = None
    max_query_tokens: int | None = None
    max_candidate_tokens: int | None = None
    max_reasoning_tokens: int | None = None

    def __post_init__(self) -> None:
        roles = get_args(Role)
        for field, known in (("pooling_position", PoolingPosition), ("rope", Rope), ("resize", Resize)):
            if getattr(self, field) not in get_args(known):
                raise self._wrong(field, f"one of {', '.join(get_args(known))}")
        if set(self.writes) - set(roles):
            raise self._wrong("writes", f"some of {', '.join(roles)}")
        if len(self.words) != len(MODALITIES):
            raise self._wrong("words", f"three words, for {'; '.join(MODALITIES)}")
        if (self.token is None) != (self.pooling_position == "last") or (self.writes and self.token is None):
            raise self._wrong("token", "a token under before_token and at_token, null under last, where none writes")
        if self.add_token and self.token is None:
            raise self._wrong("add_token", "false where there is no token")
        for role in roles:
            self._check_template(role)

    def _check_template(self, role: Role) -> None:
        template: str = getattr(self, role)
        try:
            unknown = {field for _, field, _, _ in Formatter().parse(template) if field is not None} - set(PLACEHOLDERS)
        except ValueError as error:
            raise self._wrong(role, f"a template, and this one is not readable: {error}; double a brace meant as one") from error
        if unknown:
            raise self._wrong(role, f"a template of {', '.join(PLACEHOLDERS)}; it asks for {sorted(unknown)}")
        wanted = self.direct_token or (None if role in self.writes else self.token)
        if wanted is not None and wanted not in template:
            raise self._wrong(role, f"a template that holds {wanted}, where its embedding is read")

    def _wrong(self, field: str, wanted: str) -> InputError:
        key, value = JSON_KEYS.get(field, field), repr(getattr(self, field))[:80]
        return InputError(f"profile {self.name!r}: {key} is {value}; it must be {wanted}")

    def as_json(self) -> dict[str, Any]:
        return {JSON_KEYS.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}

    @property
    def version(self) -> str:
        """Name and 8 hex digits over all fields: what an index remembers, so that another template is noticed."""
        digest = hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()
        return f"profile {self.name} {digest[:8]}"

    def render(self, content: Query | Item, *, direct: bool) -> Prompt:
        """What the model reads; `direct` asks a side that may write not to. The prompt ends where nothing behind it counts."""
        role: Role = "query" if isinstance(content, Query) else "candidate"
        template, may_write = (self.query if role == "query" else self.candidate), role in self.writes
        closed = not may_write or (direct and self.direct_token is not None)
        if closed and self.direct_token is not None:
            template = _until(template, self.direct_token, "at_token")
        elif closed and self.token is not None:
            template = _until(template, self.token, self.pooling_position)
        most = self.max_query_tokens if role == "query" else self.max_candidate_tokens
        return Prompt(tuple(self._pieces(template, content)), role, self.version, closed, most)

    def _pieces(self, template: str, content: Query | Item) -> Iterator[Piece]:
        parts: list[str | UserText] = []
        texts, layout = self._texts(content), list(Formatter().parse(template))
        has_text = any(field in ("text", "asked") and texts[field] for _, field, _, _ in layout)
        for literal, field, _, _ in layout:
            if literal:
                parts.append(literal)
            if field == "images":
                for image in content.images or ((_blank(),) if self.blank_image else ()):
                    yield Span((*parts, VISION_START))
                    yield image
                    parts = [VISION_END]
            elif field == "kind":
                parts.append(self.words[0 if not content.images else 2 if has_text else 1])
            elif field is not None and texts[field]:
                most = self.max_text_chars or len(texts[field])
                parts.append(UserText(texts[field][:most], texts[field][most:]))
        if parts:
            yield Span(tuple(parts))

    def _texts(self, content: Query | Item) -> dict[str, str]:
        """The user's text by placeholder."""
        asked = (content.instruction or "").strip() if isinstance(content, Query) else ""
        instruction, text = asked or self.instruction, content.text
        if not self.normalise:
            return {"text": text, "instruction": instruction, "asked": " ".join(part for part in (asked, text) if part)}
        both = normalise(f"{normalise(asked)} {text}")
        return {"text": normalise(text), "instruction": normalise(instruction), "asked": both}


def resolve_profile(source: Profile | str | Path) -> Profile:
    """A profile by name, or from a .json file. Raises InputError for other names and for files that break the format."""
    if isinstance(source, Profile):
        return source
    name = str(source)
    if name in PROFILES:
        return PROFILES[name]
    if name in REMOVED:
        raise InputError(f"profile {name!r} is gone: {REMOVED[name]}")
    if not name.endswith(".json"):
        hint = did_you_mean(name, PROFILES)
        raise InputError(f"profile {name!r} is unknown{hint}; choose {', '.join(PROFILES)}, or give a .json file with its fields")
    try:
        return profile_of(json.loads(Path(name).read_text(encoding="utf-8")), name)
    except OSError as error:
        raise InputError(f"profile {name}: {error.strerror or error}; check the path") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"profile {name}: not JSON ({error}); write one object") from error


def profile_of(found: object, place: str) -> Profile:
    """A profile from the fields of a JSON object; a `base` among them names the profile whose other fields it takes over."""
    keys = {JSON_KEYS.get(field.name, field.name): field for field in fields(Profile)}
    if not isinstance(found, dict) or (unknown := set(found) - {*keys, "base"}):
        shown = sorted(unknown) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{place}: {shown} is not a profile; its fields are base, {', '.join(sorted(keys))}")
    values = resolve_profile(str(found["base"])).as_json() if "base" in found else {}
    values |= {key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key != "base"}
    for key, value in values.items():
        if not isinstance(value, _types(str(keys[key].type))):
            raise InputError(f"{place}: {key} is {value!r}, which is of the wrong type; see docs/third-party.md")
    if missing := {"name", "query", "candidate"} - set(values):
        raise InputError(f"{place}: {', '.join(sorted(missing))} missing; a profile needs a name and two templates")
    return Profile(**{keys[key].name: value for key, value in values.items()})


def _types(annotation: str) -> tuple[type, ...]:
    """What a field's value may be: `str | None` as it stands; Literals are checked as str here, and by Profile."""
    known = {"int": int, "bool": bool, "None": type(None)}
    return tuple(tuple if name.startswith("tuple") else known.get(name, str) for name in annotation.split(" | "))


def _until(template: str, token: str, pooling_position: PoolingPosition) -> str:
    """The template up to its first `token`, which is kept under `at_token`: attention is causal, what follows changes nothing."""
    head, _, _ = template.partition(token)
    return head + token if pooling_position == "at_token" else head


@lru_cache(maxsize=1)
def _blank() -> ImageInput:
    return ImageInput.from_pil(Image.new("RGB", (56, 56), "white"), "blank")


def _chat(user: str, assistant: str = "", system: str | None = "You are a helpful assistant.") -> str:
    """Qwen's chat layout, open for the assistant; the system turn is the default of Qwen2-VL's and Qwen2.5-VL's chat template."""
    before = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return f"{before}<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n{assistant}"


_CONTEXT: Final = 32_768
"""Tokens of text where the project's code cuts none: what its backbone reads."""
_LAMRA: Final = "\nSummarize above {kind} in one word: "
_UME_R1: Final = (
    "\n<disc_emb>\nRepresent the above input text, images, videos, or any combination of the three as embeddings. "
    "First output the thinking process in <think> </think> tags and then summarize the entire input in a word or sentence. "
    "Finally, use the <gen_emb> tag to represent the entire input."
)
_GME: Final = _chat("{images}{text}", "<|endoftext|>", system="{instruction}")
_EMBED_RL: Final = "Summarize the above content in one word:"

PROFILES: Final[Mapping[str, Profile]] = {
    profile.name: profile
    for profile in (
        # LamRA 7286399, dataset/datasets_mbeir.py, collators/mbeir_eval.py, models/qwen2_vl.py: the state before a fixed <emb>,
        # which is that of the last token before it; positions counted one by one; candidates cut at 1,024 tokens of the whole.
        Profile(
            "lamra", _chat("{images}{asked}" + _LAMRA), _chat("{images}{text}" + _LAMRA),
            words=("sentence", "image", "image and sentence"), normalise=True, rope="sequential", resize="utils",
            min_pixels=4 * 28 * 28, max_pixels=300 * 28 * 28, max_text_tokens=_CONTEXT, max_candidate_tokens=1024,
        ),
        # UME-R1 55e5512, src/eval/VLM2Vec/eval_twomode.py and README.md; mteb 2.26.24, ume_r1.py: both sides write and are read
        # at their last <gen_emb>, or at <disc_emb> where they may not write; text alone stands behind a white image.
        Profile(
            "ume-r1", _chat("{images}{asked}" + _UME_R1), _chat("{images}{text}" + _UME_R1), pooling_position="at_token",
            token="<gen_emb>", writes=("query", "candidate"), writes_on=True, direct_token="<disc_emb>", blank_image=True,
            min_pixels=784, max_pixels=2_359_296, max_text_tokens=_CONTEXT, max_reasoning_tokens=8192,
        ),
        # GME, gme_inference.py as in VLM2Vec d9978e0: the state of <|endoftext|>, positions counted one by one, 1,800 tokens. So
        # does modeling_gme_qwen2vl.py, the publisher's later code, which asks for transformers below 4.52.
        Profile(
            "gme", _GME, _GME, instruction="You are a helpful assistant.", rope="sequential", resize="both",
            min_pixels=256 * 28 * 28, max_pixels=1280 * 28 * 28, max_text_tokens=_CONTEXT,
            max_query_tokens=1800, max_candidate_tokens=1800,
        ),
        # Embed-RL 87b52f7, eval/toy_eval/image_eval.py: the state of a fixed <emb>, texts of 512 characters. What its reasoner
        # writes is another model's, to be joined to the text.
        Profile(
            "embed-rl", _chat("{images}{asked}" + _EMBED_RL, "<emb>", system=None),
            _chat("{images}{text}" + _EMBED_RL, "<emb>", system=None), pooling_position="at_token", token="<emb>", add_token=True,
            min_pixels=128 * 32 * 32, max_pixels=768 * 32 * 32, max_text_chars=512, max_text_tokens=_CONTEXT,
        ),
    )
}  # fmt: skip

REMOVED: Final[Mapping[str, str]] = {
    "qwen3-vl-embedding": "leave --profile out; sentence-transformers reads Qwen/Qwen3-VL-Embedding-2B and -8B by their files",
    "vlm2vec": "VLM2Vec shows bare image tokens, which no profile writes; take --model Alibaba-NLP/gme-Qwen2-VL-2B-Instruct",
}
"""Profiles of earlier releases, and what to take in their place."""
