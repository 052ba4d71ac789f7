"""What the HTTP interface takes and gives, as pydantic models: the OpenAPI document is made of these and of openapi.json.

A field that may be left out may also be null, which is the same; so its type has `None`, and who reads it says the default.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    SkipValidation,
    Tag,
    WithJsonSchema,
    model_validator,
)

from traceir.index.facets import FacetKind
from traceir.index.filters import MAX_LIST_VALUES, MAX_NAME_BYTES
from traceir.index.filters import MAX_VALUES as MAX_FILTER_VALUES
from traceir.index.store import MAX_ID_BYTES, check_id
from traceir.items import Modality, Route
from traceir.retrieval.cutoff import Cut
from traceir.retrieval.pipeline import MAX_WEIGHT, Mode
from traceir.serve.faults import SAID, kind_in_json, plain
from traceir.serve.jobs import Served

MAX_TEXT: Final = 262_144  # characters, for memory's sake; what is longer than the model reads is cut, and `cut` says how much
MAX_VALUE: Final = 32_768
MAX_INPUTS: Final = 256
MAX_PARTS: Final = 32
MAX_FIELDS: Final = 32
MAX_ITEM_FIELDS: Final = 256
MAX_VALUES: Final = 10_000
MAX_K: Final = 1_000
MAX_OFFSET: Final = 10_000
MAX_TERMS: Final = 16
MAX_QUERY: Final = 4_096  # characters of a parameter in an address
NO_ZERO: Final = r"^[^\x00]*$"


def _scalar(value: object) -> object:
    """A value of a field: a text of at most MAX_VALUE characters, a finite number, true, false or null; else ValueError."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("it is not a finite number; send a number or null")
    if isinstance(value, str) and len(value) > MAX_VALUE:
        raise ValueError(f"{len(value)} characters, at most {MAX_VALUE}")
    if isinstance(value, str) and plain(value) != value:
        raise ValueError(SAID["string_unicode"])
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{kind_in_json(value)}, where a text, a number, true, false or null is wanted")
    return value


def _end(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("a boolean, where a text, a number or null is wanted")
    return _scalar(value)


def _fold(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, int | float) and 0 < value <= 1):
        return value
    raise ValueError("true, false, or a cosine above 0 and at most 1 is wanted")


def _few(where: object) -> object:
    """Counts before any value is read, so that a large body is refused at once."""
    if isinstance(where, dict) and len(where) > MAX_FIELDS:
        raise ValueError(f"{len(where)} fields, at most {MAX_FIELDS}")
    return where


def _tag(value: object) -> str | None:
    """The branch of a union that a value of JSON means; `location_of` leaves it out."""
    tags: dict[type, str] = {str: "<text>", dict: "<object>", list: "<list>"}
    return tags.get(type(value))


def _one_of(wanted: str) -> Discriminator:
    """Chooses the branch of a union by the kind of the value, so that errors are those of the branch that was meant."""
    return Discriminator(_tag, custom_error_type="kind", custom_error_message=f"{wanted} is wanted")


Text = Annotated[str, Field(max_length=MAX_TEXT)]
TextBranch = Annotated[Text, Tag("<text>")]
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_BYTES, pattern=NO_ZERO), AfterValidator(check_id)]
"""At most MAX_ID_BYTES of UTF-8, which a schema cannot say."""
_WHOLE: Final = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
"""In JSON 3.0 is a whole number too; "3" and true are none."""
_JSON_END: Final[list[dict[str, Any]]] = [{"type": "number"}, {"type": "string", "maxLength": MAX_VALUE}, {"type": "null"}]
Scalar = Annotated[
    bool | int | float | str | None, PlainValidator(_scalar), WithJsonSchema({"anyOf": [{"type": "boolean"}, *_JSON_END]})
]
End = Annotated[int | float | str | None, PlainValidator(_end), WithJsonSchema({"anyOf": _JSON_END})]
Value = bool | int | float | str | None | list[bool | int | float | str | None]
"""A field as it is kept, which may have come by another way than this interface."""


class Lenient(BaseModel):
    """Values of another type are refused."""

    model_config = ConfigDict(strict=True)


class Strict(Lenient):
    """Unknown fields are refused too, so that a typing error does not pass silently."""

    model_config = ConfigDict(extra="forbid")


class ImageIn(Strict):
    """An image: exactly one of base64 `data` (or a data URL), an indexed `item`, or a `url` of an allowed host."""

    data: str | None = None
    item: Id | None = None
    url: Annotated[str, Field(max_length=2048)] | None = None


class RangeIn(Strict):
    """Ends of a range, both included."""

    gte: End = None
    lte: End = None


Condition = Annotated[
    Annotated[Scalar, Tag("<value>")]
    | Annotated[list[Scalar], Field(max_length=MAX_VALUES, fail_fast=True), Tag("<list>")]
    | Annotated[RangeIn, Tag("<object>")],
    Discriminator(lambda value: "<value>" if isinstance(value, str) else _tag(value) or "<value>"),
]
Where = Annotated[dict[str, Condition], Field(max_length=MAX_FIELDS), BeforeValidator(_few)]
"""Field -> a value, several of which one must match, or a range; all fields must match."""
Conditions = Annotated[
    TextBranch | Annotated[Where, Tag("<object>")],
    _one_of("an object of fields, or a text such as `date>=2024-05 and place=Oslo`,"),
]
Sort = Annotated[str, Field(min_length=1, max_length=MAX_NAME_BYTES + 1, pattern=NO_ZERO)]
"""A field, with a minus in front for the other direction."""
Fold = Annotated[
    bool | float,
    PlainValidator(_fold),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "number", "exclusiveMinimum": 0, "maximum": 1}]}),
]
Part = Annotated[TextBranch | Annotated[ImageIn, Tag("<object>")], _one_of("a text or an image object")]


class TermIn(Strict):
    """What a query is moved towards, or away from by a negative weight: a text, an image, both, or interleaved `parts`."""

    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)] = 1.0
    text: Text | None = None
    image: ImageIn | None = None
    parts: Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)] | None = None


class SearchIn(Strict):
    """A query: text, image, both, or interleaved `parts`; `instruction` says what is wanted, `modality` of which kind."""

    most_texts: ClassVar[int] = 2 * MAX_FILTER_VALUES
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"text": "a red cup", "modality": "image", "k": 5}]}, use_attribute_docstrings=True
    )

    text: Text | None = None
    image: ImageIn | None = None
    parts: Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)] | None = None
    instruction: Text | None = None
    modality: Modality | None = None
    route: Route | None = "auto"
    k: Annotated[int, Field(ge=1, le=MAX_K), _WHOLE] | None = 10
    offset: Annotated[int, Field(ge=0, le=MAX_OFFSET), _WHOLE] | None = 0
    where: Conditions | None = None
    exact: bool | None = True
    mode: Mode | None = "vector"
    """What ranks: the model's vectors, the words (BM25), or both (reciprocal rank fusion)."""
    keyword_weight: Annotated[float, Field(ge=0, le=1)] | None = 0.5
    """The words' share in `hybrid`."""
    terms: Annotated[list[TermIn], Field(max_length=MAX_TERMS, fail_fast=True)] | None = None
    sort: Sort | None = None
    """Order the relevant hits (those above the cut-off, else the best 100) by a field; `-date` is the newest first."""
    fold: Fold | None = False
    """Put near-duplicates and bursts under their best hit (`similar`); a number is the cosine from which on two are alike."""
    after: Text | None = None
    """The `next` of the page before: hits that were shown are left out."""
    rerank: bool | None = False
    """Order the best hits anew by the server's reranker (`serve --rerank`)."""
    cutoff: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Leave out hits that this share of queries would get whose answer is not there; 0: none, absent: the server's own."""


class Trace(BaseModel):
    """How an input was encoded: its route, what was written, how many tokens of a long text were cut, wall time by stage (null:
    there was no such stage). A search by keywords alone encodes nothing: its `route` and `emb_probability` are null."""

    route: Literal["reason", "direct"] | None
    reasoning: str
    tokens: int
    truncated: bool
    emb_probability: float | None
    cut: int
    cached: bool
    seconds: dict[Literal["queue", "encode", "search", "rerank"], float | None]

    @classmethod
    def of(cls, served: Served | None, search: float | None = None, rerank: float | None = None) -> Trace:
        seconds: dict[Literal["queue", "encode", "search", "rerank"], float | None]
        seconds = {"queue": None, "encode": None, "search": search}
        if rerank is not None:
            seconds["rerank"] = rerank
        if served is None:
            return cls(
                route=None, reasoning="", tokens=0, truncated=False, emb_probability=None, cut=0, cached=False, seconds=seconds
            )
        encoding = served.encoding
        seconds |= {"queue": served.queue, "encode": served.encode}
        return cls(
            route=encoding.route, reasoning=encoding.reasoning, tokens=encoding.tokens, truncated=encoding.truncated,
            emb_probability=encoding.emb_probability, cut=served.cut, cached=served.cached, seconds=seconds,
        )  # fmt: skip


class ItemOut(BaseModel):
    """What is kept of an item; `image` is the path of its image on this server."""

    id: str
    modality: Modality
    text: str | None
    image: str | None
    fields: dict[str, Value]


class HitOut(ItemOut):
    """One found item. `scores`: what each of "vector" (cosine), "keyword" (BM25) and "rerank" gave it; `similar`: the ids of hits
    folded under it."""

    score: float
    rank: int
    scores: dict[str, float] = Field(default_factory=dict)
    similar: list[str] = Field(default_factory=list)


class SearchOut(BaseModel):
    """Hits from rank `offset` + 1, best first; `more`: there are others behind them, which `next` as `after` of the same request
    brings; `cutoff` only where one was on. `note` is what is to be told of them: that the model knows no such things."""

    hits: list[HitOut]
    trace: Trace
    offset: int
    k: int
    more: bool
    next: str | None = None
    cutoff: Cut | None = None
    note: str | None = None


FieldIn = Annotated[
    Annotated[Scalar, Tag("<value>")] | Annotated[list[Scalar], Field(max_length=MAX_LIST_VALUES, fail_fast=True), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<value>"),
]


class ItemIn(Strict):
    """One item to be indexed: a text, an image, or both, and free fields."""

    id: Id
    text: Text | None = None
    image: ImageIn | None = None
    fields: Annotated[dict[str, FieldIn], Field(max_length=MAX_ITEM_FIELDS)] | None = None


class ItemsIn(Strict):
    """Items to be added. What is wrong with one of them is its own failure, and the others are added."""

    each_alone: ClassVar[bool] = True
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"items": [{"id": "cup-1", "text": "a red cup", "fields": {"shelf": 3}}]}]}
    )

    items: Annotated[list[SkipValidation[ItemIn | Any]], Field(min_length=1, max_length=MAX_INPUTS)]


class ItemResult(BaseModel):
    """What became of one item; `error` says why it failed, `cut` how many tokens of its text the model did not read. `id` is null
    where the item had none that could be read."""

    id: str | None
    status: Literal["added", "updated", "failed"]
    error: str | None = None
    cut: int = 0


class ItemsOut(BaseModel):
    """In the order of the request. What is `added` or `updated` is durable."""

    results: list[ItemResult]


class IdsIn(Strict):
    ids: Annotated[list[Id], Field(min_length=1, max_length=MAX_K, fail_fast=True)]


class Deleted(BaseModel):
    deleted: int


class ItemPage(BaseModel):
    """Items in order; `more`: there are others behind them, which `next` as `after` of the same request brings."""

    items: list[ItemOut]
    offset: int
    more: bool
    next: str | None = None


def _image_of_text(value: object) -> object:
    return {"data": value} if isinstance(value, str) else value


def _image_of_address(value: object) -> object:
    """The image of a chat's `image_url`, a data URL or an address, which may stand in an object."""
    address = value.get("url") if isinstance(value, dict) else value
    if not isinstance(address, str):
        raise ValueError(f"{kind_in_json(address)}, where a data URL or an address is wanted")
    return {"data": address} if address.startswith("data:") else {"url": address}


class ContentIn(Strict):
    """A text, an image, or both, as SGLang and Jina write it; `image` is base64 or a data URL."""

    text: Text | None = None
    image: Annotated[ImageIn, BeforeValidator(_image_of_text, json_schema_input_type=str | ImageIn)] | None = None


Input = Annotated[
    TextBranch | Annotated[ContentIn, Tag("<object>")],
    _one_of("a text or an object of text and image (token ids belong to one model's tokenizer: send the text itself)"),
]


class ChatPart(Lenient):
    """A text, or an image by data URL or by address."""

    type: Literal["text", "input_text", "image_url", "image", "input_image", "image_base64"]
    text: Text | None = None
    image_url: Annotated[
        Annotated[ImageIn, BeforeValidator(_image_of_address)] | None,
        Field(validation_alias=AliasChoices("image_url", "image", "input_image", "image_base64")),
        WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "object", "properties": {"url": {"type": "string"}}}]}),
    ] = None

    @model_validator(mode="before")
    @classmethod
    def _own(cls, part: Any) -> Any:
        """What belongs to the type alone: other fields are ignored, as those we do not know."""
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            return part
        own = "text" if "text" in kind else kind if part.get(kind) else "image_url"
        return {name: part[name] for name in ("type", own) if name in part}

    @model_validator(mode="after")
    def _is_whole(self) -> ChatPart:
        wanted = "text" if "text" in self.type else "image_url"
        if getattr(self, wanted) is None:
            raise ValueError(f"a content of type {self.type!r} needs a {wanted}")
        return self


ChatParts = Annotated[TextBranch | Annotated[ChatPart, Tag("<object>")], _one_of("a text or an object of type text or image_url")]


class Message(Lenient):
    role: Literal["system", "user", "assistant", "developer"]
    content: Annotated[TextBranch | Annotated[list[ChatParts], Tag("<list>")], _one_of("a text or a list of contents")]


Inputs = Annotated[
    TextBranch | Annotated[list[Input], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("<list>")],
    _one_of("a text, or a list of texts and objects of text and image,"),
]
Chat = Annotated[
    Annotated[Message, Tag("<object>")] | Annotated[list[Message], Tag("<list>")], _one_of("a message or a list of messages")
]


class EmbeddingsIn(Lenient):
    """OpenAI's request, and more: objects of text and image, or chats. Fields we do not know are ignored, as OpenAI's are."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["a red cup", {"text": "a blue cup"}]}]})

    model: str | None = None
    input: Inputs | None = None
    messages: Annotated[list[Chat], Field(max_length=MAX_INPUTS, fail_fast=True)] | None = None
    input_type: Literal["query", "document"] | None = None
    instruction: Text | None = None
    modality: Modality | None = None
    route: Route | None = "auto"
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1, le=65_536), _WHOLE] | None = None
    user: str | None = None


class EmbeddingOut(BaseModel):
    """`embedding`: float numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    trace: Trace


class TokenUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingOut]
    model: str
    usage: TokenUsage


class ModelOut(BaseModel):
    """OpenAI's entry, and what an index checks."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    fingerprint: str
    prompt_version: str
    width: int


class ModelsOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelOut]


class FacetOut(BaseModel):
    """A field that `count` items have. `values`: the commonest with how many have them; of dates the years, of `id` (kind
    `folder`) the first folders. `low` and `high` are the ends of all values. In large collections counts are estimates."""

    name: str
    kind: FacetKind
    count: int
    low: Value
    high: Value
    values: list[tuple[Value, int]]


class FacetsOut(BaseModel):
    """Fields to choose filters from, those that most items have first."""

    facets: list[FacetOut]


class PictureIn(Strict):
    image: ImageIn


class PictureOut(BaseModel):
    """An image that can be searched with; pixels."""

    width: int
    height: int


class PageExample(SearchIn):
    """A query that the page offers; `title` says what it shows."""

    title: str


class CutoffConfig(BaseModel):
    """The rate of searches that state none (null: no cut-off), and the number of background queries by modality."""

    default: float | None
    background: dict[Modality, int]


class PicturesConfig(BaseModel):
    """Images that can be searched with: names of formats by media type, suffixes of files, and bytes of one at most."""

    types: dict[str, str]
    suffixes: list[str]
    most_bytes: int


class PageConfig(BaseModel):
    """What the page shows before the first search. `world`: what alone the model knows, "" where it has no bounds; `reasons`:
    whether queries may be reasoned about; `instead`: commands that help where the collection is not what the model knows;
    `fold`: whether near-duplicates are folded if nobody says otherwise, which a model that knows little makes many of."""

    title: str
    instructions: list[str]
    modalities: list[Modality]
    model: ModelOut
    count: dict[str, int]
    examples: list[PageExample]
    world: str
    reasons: bool
    instead: list[str]
    cutoff: CutoffConfig
    fold: bool
    pictures: PicturesConfig


class Status(BaseModel):
    status: str
