"""Profiles: how checkpoints of other projects are prompted and read, as data instead of code (profiles.toml).

A profile holds one template for queries and one for candidates, and says where the embedding is read: before a token, at a token,
or at the last token of the prompt; whether that token stands in the template or the model writes it; and who may write.
A user's own profile is a JSON file with the same fields (docs/third-party.md).
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields
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
            self._check_template(role, getattr(self, role))

    def _check_template(self, role: Role, template: str) -> None:
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
        template: str = getattr(self, role)
        closed = role not in self.writes or (direct and self.direct_token is not None)
        read_at = self.direct_token or self.token
        if closed and read_at is not None:  # attention is causal: what follows changes nothing
            template = template.partition(read_at)[0]
            template += read_at if self.direct_token or self.pooling_position == "at_token" else ""
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


def profile_of(read: object, source: str) -> Profile:
    """A profile from the fields of a JSON object; a `base` among them names the profile whose other fields it takes over."""
    keys = {JSON_KEYS.get(field.name, field.name): field for field in fields(Profile)}
    if not isinstance(read, dict) or (unknown := set(read) - {*keys, "base"}):
        shown = sorted(unknown) if isinstance(read, dict) else type(read).__name__
        raise InputError(f"{source}: {shown} is not a profile; its fields are base, {', '.join(sorted(keys))}")
    values = resolve_profile(str(read["base"])).as_json() if "base" in read else {}
    values |= {key: tuple(value) if isinstance(value, list) else value for key, value in read.items() if key != "base"}
    for key, value in values.items():
        if not isinstance(value, _types(keys[key])):
            raise InputError(f"{source}: {key} is {value!r}, which is of the wrong type; see docs/third-party.md")
    if missing := {"name", "query", "candidate"} - set(values):
        raise InputError(f"{source}: {', '.join(sorted(missing))} missing; a profile needs a name and two templates")
    return Profile(**{keys[key].name: value for key, value in values.items()})


def _types(field: Field[Any]) -> tuple[type, ...]:
    """What its value may be; Literals are str here, and checked by Profile."""
    known = {"int": int, "bool": bool, "None": type(None)}
    return tuple(tuple if name.startswith("tuple") else known.get(name, str) for name in str(field.type).split(" | "))


@lru_cache(maxsize=1)
def _blank() -> ImageInput:
    return ImageInput.from_pil(Image.new("RGB", (56, 56), "white"), "blank")


_FILE: Final = Path(__file__).with_suffix(".toml")
_DATA: Final = tomllib.loads(_FILE.read_text(encoding="utf-8"))
PROFILES: Final[Mapping[str, Profile]] = {
    name: profile_of({"name": name, **written}, str(_FILE)) for name, written in _DATA["profiles"].items()
}
REMOVED: Final[Mapping[str, str]] = _DATA["removed"]
"""Profiles of earlier releases, and what to take in their place."""
