"""TraceIR inside LangChain (extra `langchain`): embeddings, and a retriever whose queries may reason.

embeddings = TraceEmbeddings(Encoder.from_pretrained())                   # in this process
embeddings = TraceEmbeddings.of_server("http://localhost:8080", "tir_...")  # by `traceir serve`
retriever = TraceRetriever(source=Client("http://localhost:8080", "tir_..."), k=5, target="image")
retriever.invoke("a red shoe")[0].metadata["traceir"]["score"]
"""

from __future__ import annotations

import asyncio
from typing import Any

from traceir.client import Client, ServedEncoder
from traceir.errors import InputError
from traceir.integrations import Vectors, embed_texts, lists
from traceir.items import Item, Modality, Query, Route
from traceir.retrieval.pipeline import Mode
from traceir.retrieval.search import EncoderLike

try:
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.retrievers import BaseRetriever
    from pydantic import ConfigDict, field_validator
except ImportError as error:
    raise ImportError("traceir.integrations.langchain needs langchain-core: pip install 'traceir[langchain]'") from error


class TraceEmbeddings(Embeddings):
    """LangChain's Embeddings over an encoder. Documents never reason; a query takes `route`, with `instruction` and `target`."""

    def __init__(
        self, encoder: EncoderLike, *, instruction: str | None = None, target: Modality | None = None, route: Route = "auto"
    ) -> None:
        self.encoder, self.instruction, self.target, self.route = encoder, instruction, target, route

    @classmethod
    def of_server(cls, base_url: str, api_key: str = "", **options: Any) -> TraceEmbeddings:
        """Over a running `traceir serve`; `options` as for the class."""
        return cls(ServedEncoder(Client(base_url, api_key)), **options)

    def embed_documents(self, texts: list[str]) -> Vectors:
        """Vectors of texts as candidates. Raises InputError for an empty text."""
        return embed_texts(self.encoder, texts)

    def embed_query(self, text: str) -> list[float]:
        """The vector of a text as a query."""
        return self.embed_multimodal_query(text)

    def embed_image(self, uris: list[str]) -> Vectors:
        """Vectors of image files as candidates, by their paths; network addresses are refused."""
        return lists(self.encoder.encode_items([Item.of(image=uri) for uri in uris]))

    async def aembed_image(self, uris: list[str]) -> Vectors:
        return await asyncio.to_thread(self.embed_image, uris)

    def embed_multimodal_query(self, text: str | None = None, image: str | None = None) -> list[float]:
        """The vector of a query of a text, an image file, or both ("the same in green")."""
        query = Query.of(text=text, image=image, instruction=self.instruction, target=self.target)
        return lists(self.encoder.encode_queries([query], route=self.route))[0]


class TraceRetriever(BaseRetriever):
    """LangChain's retriever over a Searcher (in this process) or a Client (of a server).

    `where` is a text in the language of filters, a Filter for a Searcher, or the mapping of `Client.search` for a Client; `mode`
    says what ranks: vectors, words, or both. A Document holds the item's id, its text,
    and as metadata the item's fields under their own names; `id`, `score`, `rank`, `modality` and `image` of the hit stand
    together in the dict under the one name `traceir`, in place of a field of that name.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    source: Any
    k: int = 10
    route: Route = "auto"
    instruction: str | None = None
    target: Modality | None = None
    where: Any = None
    exact: bool = True
    mode: Mode = "vector"

    @field_validator("source")
    @classmethod
    def _searches(cls, source: Any) -> Any:
        if not callable(getattr(source, "search", None)):
            raise InputError(f"source {type(source).__name__} cannot search; give a Searcher or a Client")
        return source

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        asked = Query.of(text=query, instruction=self.instruction, target=self.target)
        hits = self.source.search(asked, k=self.k, route=self.route, where=self.where, exact=self.exact, mode=self.mode).hits
        names = ("id", "score", "rank", "modality", "image")
        return [
            Document(
                id=hit.id,
                page_content=hit.text or "",
                metadata={**hit.fields, "traceir": {name: getattr(hit, name) for name in names}},
            )
            for hit in hits
        ]
