"""What the HTTP interface takes and gives, as pydantic models, and its refusals: the OpenAPI document is made of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SkipValidation,
    StringConstraints,
    Tag,
    WithJsonSchema,
)

from traceir.index.filters import MAX_LIST_VALUES
from traceir.index.filters import MAX_VALUES as MAX_FILTER_VALUES
from traceir.items import Modality, Route
from traceir.serve.jobs import Served
from traceir.serve.values import WHOLE, End, Id, Lenient, Scalar, Strict, Text, Value, one_of, tag_of

MAX_INPUTS = 256
MAX_PARTS = 32
MAX_FIELDS = 32
MAX_ITEM_FIELDS = 256
MAX_LIST = MAX_LIST_VALUES
MAX_VALUES = 10_000
MAX_K = 1_000
MAX_OFFSET = 10_000


class ImageIn(Strict):
    """A picture: exactly one of base64 `data` (or a data URL), an indexed `item`, or a `url` of an allowed host."""

    data: str | None = None
    item: Id | None = None
    url: Annotated[str, StringConstraints(max_length=2048)] | None = None


class Range(Strict):
    """Ends of a range, both included."""

    gte: End = None
    lte: End = None


def _few(where: object) -> object:
    """Counts before any value is read, so that a large body is refused at once."""
    if isinstance(where, dict) and len(where) > MAX_FIELDS:
        raise ValueError(f"{len(where)} fields, at most {MAX_FIELDS}")
    return where


Condition = Annotated[
    Annotated[Scalar, Tag("<value>")]
    | Annotated[list[Scalar], Field(max_length=MAX_VALUES, fail_fast=True), Tag("<list>")]
    | Annotated[Range, Tag("<object>")],
    Discriminator(lambda value: {"<object>": "<object>", "<list>": "<list>"}.get(tag_of(value), "<value>")),
]
Where = Annotated[dict[str, Condition], Field(max_length=MAX_FIELDS), BeforeValidator(_few)]
"""Field -> a value, several of which one must match, or a range; all fields must match."""


Part = Annotated[Annotated[Text, Tag("<text>")] | Annotated[ImageIn, Tag("<object>")], one_of("a text or a picture object")]


class SearchIn(Strict):
    """A query: text, picture, both, or interleaved `parts`; `instruction` says what is wanted, `modality` of which kind."""

    most_texts: ClassVar[int] = 2 * MAX_FILTER_VALUES
    model_config = ConfigDict(json_schema_extra={"examples": [{"text": "a red cup", "modality": "image", "k": 5}]})

    text: Text | None = None
    image: ImageIn | None = None
    parts: Annotated[list[Part], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)] | None = None
    instruction: Text | None = None
    modality: Modality | None = None
    route: Route = "auto"
    k: Annotated[int, Field(ge=1, le=MAX_K), WHOLE] = 10
    offset: Annotated[int, Field(ge=0, le=MAX_OFFSET), WHOLE] = 0
    where: Where | None = None
    exact: bool = True
    cutoff: Annotated[
        float | None,
        Field(
            ge=0, lt=1,
            description="Leave out hits that this share of queries would get whose answer is not there; 0: none, absent: the "
            "server's own.",
        ),
    ] = None  # fmt: skip


class Seconds(BaseModel):
    """Wall time by stage; `search` only where an index was asked."""

    queue: float
    encode: float
    search: float | None = None


class Trace(BaseModel):
    """How an input was encoded: its road, what was written, how many tokens of a long text were cut, where the time went."""

    route: Literal["reason", "direct"]
    reasoning: str
    tokens: int
    truncated: bool
    emb_probability: float
    cut: int
    cached: bool
    seconds: Seconds


class HitOut(BaseModel):
    """One found item. `image` is the path of its picture on this server."""

    id: str
    score: float
    rank: int
    modality: Modality
    text: str | None
    image: str | None
    fields: dict[str, Value]


class Cutoff(BaseModel):
    """What a cut-off did: hits of a modality score more than its threshold in `thresholds`, `below` of those looked at do not,
    and the best of all scored `best` (null: there was none)."""

    rate: float
    thresholds: dict[Modality, float]
    below: int
    best: float | None


class SearchOut(BaseModel):
    """Hits from rank `offset` + 1, best first; `more`: there are others behind them; `cutoff` only where one was on. `note` is
    what is to be told of them: that the model knows no such things."""

    hits: list[HitOut]
    trace: Trace
    offset: int
    k: int
    more: bool
    cutoff: Cutoff | None = None
    note: str | None = None


FieldIn = Annotated[
    Annotated[Scalar, Tag("<value>")] | Annotated[list[Scalar], Field(max_length=MAX_LIST, fail_fast=True), Tag("<list>")],
    Discriminator(lambda value: "<list>" if isinstance(value, list) else "<value>"),
]


class ItemIn(Strict):
    """One item to be indexed: a text, a picture, or both, and free fields."""

    id: Id
    text: Text | None = None
    image: ImageIn | None = None
    fields: Annotated[dict[str, FieldIn], Field(max_length=MAX_ITEM_FIELDS)] = Field(default_factory=dict)


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


class ItemOut(BaseModel):
    """What is kept of an item."""

    id: str
    modality: Modality
    text: str | None
    image: str | None
    fields: dict[str, Value]


class ItemPage(BaseModel):
    """Items in order of id; `more`: there are others behind them."""

    items: list[ItemOut]
    offset: int
    more: bool


class ContentIn(Strict):
    """A text, a picture, or both, as SGLang and Jina write it; `image` is base64 or a data URL."""

    text: Text | None = None
    image: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[ImageIn, Tag("<object>")],
            one_of("base64, a data URL or a picture object"),
        ]
        | None
    ) = None


Input = Annotated[
    Annotated[Text, Tag("<text>")] | Annotated[ContentIn, Tag("<object>")],
    one_of("a text or an object of text and image (token ids belong to one model's tokenizer: send the text itself)"),
]
CHAT_ROLES: Final = ("system", "user", "assistant", "developer")
_PART: Final = {
    "type": "object", "required": ["type"], "description": "A text, or a picture by data URL or by address.",
    "oneOf": [
        {"required": ["text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}},
        {"required": ["image_url"], "properties": {"type": {"const": "image_url"}, "image_url": {
            "type": "object", "required": ["url"], "properties": {"url": {"type": "string", "format": "uri"}},
        }}},
    ],
}  # fmt: skip
_CHAT: Final = {
    "type": "array", "minItems": 1, "items": {
        "type": "object", "required": ["role", "content"], "properties": {
            "role": {"enum": list(CHAT_ROLES)}, "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": _PART}]},
        },
    },
}  # fmt: skip
Chats = Annotated[
    list[Any],
    Field(max_length=MAX_INPUTS),
    WithJsonSchema({"anyOf": [_CHAT | {"maxItems": MAX_INPUTS}, {"type": "array", "maxItems": MAX_INPUTS, "items": _CHAT}]}),
]
"""One chat, or several; service.py reads them by hand, to say what is wrong with which."""


class EmbeddingsIn(Lenient):
    """OpenAI's request, and more: objects of text and picture, or chats. Fields we do not know are ignored, as OpenAI's are."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["a red cup", {"text": "a blue cup"}]}]})

    model: str | None = None
    input: (
        Annotated[
            Annotated[Text, Tag("<text>")] | Annotated[list[Input], Field(max_length=MAX_INPUTS, fail_fast=True), Tag("<list>")],
            one_of("a text, or a list of texts and objects of text and image,"),
        ]
        | None
    ) = None
    messages: Chats | None = None
    input_type: Literal["query", "document"] | None = None
    instruction: Text | None = None
    modality: Modality | None = None
    route: Route = "auto"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=65_536), WHOLE] | None = None
    user: str | None = None


class EmbeddingOut(BaseModel):
    """`embedding`: float numbers, or base64 of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    trace: Trace


class Usage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingsOut(BaseModel):
    object: Literal["list"] = "list"
    data: list[EmbeddingOut]
    model: str
    usage: Usage


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


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorOut(BaseModel):
    """Every error has OpenAI's shape."""

    error: ErrorDetail


Responses = dict[int | str, dict[str, Any]]


def _refusals(told: Mapping[int, str], headers: Mapping[str, str] | None = None) -> Responses:
    """Answers with an ErrorOut, by status."""
    shape = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorOut"}}}
    shown = {name: {"schema": {"type": kind}, "required": True} for name, kind in (headers or {}).items()}
    return {str(status): {"description": why, "content": shape, "headers": shown} for status, why in told.items()}


WALL: Final[Responses] = _refusals({
    400: "The request cannot be understood or done; the message says what to change.",
    413: "The body is too large.",
    414: "The path and query are too long.",
    415: "A body is JSON, and not packed.",
    421: "The server does not answer to this Host.",
    431: "The headers are too many or too large.",
}) | {500: {"model": ErrorOut, "description": "The server failed; its log says why."}}  # fmt: skip
"""What any route may answer."""
FOR_BODIES: Final = _refusals({408: "The body did not come, or the answer was not found, in time."})
FOR_WRITERS: Final = _refusals({403: "A page of this origin may not use the server, or the key has no scope for this."})
FOR_CALLERS: Final = _refusals({503: "The model is being loaded, or the index or the keys cannot be used now."}) | _refusals(
    {429: "Too many requests."}, {"Retry-After": "integer"}
)
"""Of every route but those of `gate.OPEN_PATHS`."""
FOR_KEYS: Final = _refusals({403: FOR_WRITERS["403"]["description"]}) | _refusals(
    {401: "A key is needed, or the one given is not known."}, {"WWW-Authenticate": "string"}
)
NOT_READY: Final = _refusals({503: "The model is being loaded."})
MISSING: Final = _refusals({404: "There is no such item, picture or model."})
METRICS: Final[Responses] = {200: {"description": "The counters.", "content": {"text/plain": {"schema": {"type": "string"}}}}}
JPEG: Final[Responses] = MISSING | {
    200: {"description": "The picture.", "content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}}
}
EVENTS: Final[Responses] = {
    200: {
        "description": (
            "Server-sent events, the data of each in JSON: `route` ({route, emb_probability}), `reasoning` ({text}: all that is "
            "written so far), any number of times, then `hits` (a SearchOut) or `error` (an ErrorOut)."
        ),
        "content": {
            "text/event-stream": {
                "itemSchema": {
                    "type": "object",
                    "required": ["event", "data"],
                    "properties": {
                        "event": {"enum": ["route", "reasoning", "hits", "error"]},
                        "data": {"type": "string", "contentMediaType": "application/json"},
                    },
                }
            }
        },
    }
}


class Example(SearchIn):
    """A query that the page offers; `title` says what it shows."""

    title: str


class CutoffConfig(BaseModel):
    """The rate of searches that state none (null: no cut-off), and the number of background queries by modality."""

    default: float | None
    background: dict[Modality, int]


class PageConfig(BaseModel):
    """What the page shows before the first search."""

    title: str
    instructions: list[str]
    modalities: list[Modality]
    model: ModelOut
    count: dict[str, int]
    examples: list[Example]
    world: str
    """What alone the model knows; "" where it has no such bounds."""
    reasons: bool
    """Whether queries may be reasoned about."""
    instead: list[str]
    """Commands that give useful hits, where the collection is not what the model knows."""
    cutoff: CutoffConfig


class Status(BaseModel):
    status: str


def trace_of(served: Served, search: float | None = None) -> Trace:
    encoding = served.encoding
    return Trace(
        route=encoding.route,
        reasoning=encoding.reasoning,
        tokens=encoding.tokens,
        truncated=encoding.truncated,
        emb_probability=encoding.emb_probability,
        cut=served.cut,
        cached=served.cached,
        seconds=Seconds(queue=served.queue, encode=served.encode, search=search),
    )
