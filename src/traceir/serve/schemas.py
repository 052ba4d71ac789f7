"""What the HTTP interface takes and gives, as pydantic models: the OpenAPI document is made of these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from traceir.items import Encoding, Modality, Route

MAX_TEXT = 32_768
MAX_INPUTS = 256
MAX_PARTS = 32
MAX_K = 1_000
MAX_OFFSET = 10_000

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | int | Number | Text | None


class Strict(BaseModel):
    """Unknown fields are refused, so that a typing error does not pass silently."""

    model_config = ConfigDict(extra="forbid")


class PictureIn(Strict):
    """A picture: exactly one of base64 `data` (or a data URL), an indexed `item`, or a `url` of an allowed host."""

    data: str | None = None
    item: Id | None = None
    url: Annotated[str, StringConstraints(max_length=2048)] | None = None


class Range(Strict):
    """Ends of a range, both included."""

    gte: Number | Text | None = None
    lte: Number | Text | None = None


Where = dict[str, Scalar | list[Scalar] | Range]
"""Field -> a value, several of which one must match, or a range; all fields must match."""


class SearchIn(Strict):
    """A query: text, picture, both, or interleaved `parts`; `instruction` says what is wanted, `modality` of which kind."""

    text: Text | None = None
    image: PictureIn | None = None
    parts: Annotated[list[Text | PictureIn], Field(max_length=MAX_PARTS)] | None = None
    instruction: Text | None = None
    modality: Modality | None = None
    route: Route = "auto"
    k: Annotated[int, Field(ge=1, le=MAX_K)] = 10
    offset: Annotated[int, Field(ge=0, le=MAX_OFFSET)] = 0
    where: Where | None = None
    exact: bool = True


class Seconds(BaseModel):
    """Wall time by stage; `search` only where an index was asked."""

    queue: float
    encode: float
    search: float | None = None


class Trace(BaseModel):
    """How an input was encoded: its road, what was written, and where the time went."""

    route: Literal["reason", "direct"]
    reasoning: str
    tokens: int
    truncated: bool
    emb_probability: float
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
    fields: dict[str, Scalar]


class SearchOut(BaseModel):
    """Hits from rank `offset` + 1, best first; `more`: there are others behind them."""

    hits: list[HitOut]
    trace: Trace
    offset: int
    k: int
    more: bool


class ItemIn(Strict):
    """One item to be indexed: a text, a picture, or both, and free fields."""

    id: Id
    text: Text | None = None
    image: PictureIn | None = None
    fields: dict[str, Scalar] = Field(default_factory=dict)


class ItemsIn(Strict):
    items: Annotated[list[ItemIn], Field(min_length=1, max_length=MAX_INPUTS)]


class ItemResult(BaseModel):
    """What became of one item; `error` says why it failed."""

    id: str
    status: Literal["added", "updated", "failed"]
    error: str | None = None


class ItemsOut(BaseModel):
    """In the order of the request. What is `added` or `updated` is durable."""

    results: list[ItemResult]


class IdsIn(Strict):
    ids: Annotated[list[Id], Field(min_length=1, max_length=MAX_K)]


class Deleted(BaseModel):
    deleted: int


class ItemOut(BaseModel):
    """What is kept of an item."""

    id: str
    modality: Modality
    text: str | None
    image: str | None
    fields: dict[str, Scalar]


class ItemPage(BaseModel):
    """Items in order of id; `more`: there are others behind them."""

    items: list[ItemOut]
    offset: int
    more: bool


class ContentIn(Strict):
    """A text, a picture, or both, as SGLang and Jina write it; `image` is base64 or a data URL."""

    text: Text | None = None
    image: str | PictureIn | None = None


class EmbeddingsIn(BaseModel):
    """OpenAI's request, and more: objects of text and picture, or chats. Fields we do not know are ignored, as OpenAI's are."""

    model: str | None = None
    input: Text | Annotated[list[Text | ContentIn], Field(max_length=MAX_INPUTS)] | None = None
    messages: Annotated[list[Any], Field(max_length=MAX_INPUTS)] | None = None
    input_type: Literal["query", "document"] | None = None
    instruction: Text | None = None
    modality: Modality | None = None
    route: Route = "auto"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1, le=65_536)] | None = None
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


class PageConfig(BaseModel):
    """What the page shows before the first search."""

    title: str
    instructions: list[str]
    modalities: list[Modality]
    model: ModelOut
    count: dict[str, int]
    examples: list[SearchIn]


class Status(BaseModel):
    status: str


def trace_of(encoding: Encoding, queue: float, encode: float, cached: bool, search: float | None = None) -> Trace:
    return Trace(
        route=encoding.route,
        reasoning=encoding.reasoning,
        tokens=encoding.tokens,
        truncated=encoding.truncated,
        emb_probability=encoding.emb_probability,
        cached=cached,
        seconds=Seconds(queue=queue, encode=encode, search=search),
    )
