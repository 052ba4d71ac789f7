"""TraceIR inside LlamaIndex (extra `llamaindex`): one embedding for texts and images, whose queries may reason.

embedding = TraceEmbedding(Encoder.from_pretrained())                   # in this process
embedding = TraceEmbedding.of_server("http://localhost:8080", "tir_...")  # by `traceir serve`
embedding.get_query_embedding("a red shoe"), embedding.get_image_embedding("shoe.png")
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from traceir.client import Client, ServedEncoder
from traceir.integrations import embed_texts, lists
from traceir.items import Item, Modality, Query, Route
from traceir.retrieval.search import EncoderLike

try:
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.embeddings.multi_modal_base import MultiModalEmbedding
except ImportError as error:
    raise ImportError("traceir.integrations.llamaindex needs llama-index-core: pip install 'traceir[llamaindex]'") from error

ImageFile = str | Path | BytesIO
Vector = list[float]


class TraceEmbedding(MultiModalEmbedding):
    """LlamaIndex's multimodal embedding over an encoder.

    Texts and images are candidates, which never reason; a query takes `route`, with `instruction` and `target`.
    """

    instruction: str | None = Field(default=None, description="what a query looks for, in words")
    target: Modality | None = Field(default=None, description="the modality looked for; None is any")
    route: Route = Field(default="auto", description="who decides about reasoning")
    _encoder: EncoderLike = PrivateAttr()

    def __init__(self, encoder: EncoderLike, **options: Any) -> None:
        super().__init__(**{"model_name": f"traceir {encoder.fingerprint}", "embed_batch_size": 64, **options})
        self._encoder = encoder

    @classmethod
    def of_server(cls, base_url: str, api_key: str = "", **options: Any) -> TraceEmbedding:
        """Over a running `traceir serve`; `options` as for the class."""
        return cls(ServedEncoder(Client(base_url, api_key)), **options)

    @classmethod
    def class_name(cls) -> str:
        return "TraceEmbedding"

    def _get_query_embedding(self, query: str) -> Vector:
        asked = Query.of(text=query, instruction=self.instruction, target=self.target)
        return lists(self._encoder.encode_queries([asked], route=self.route))[0]

    def _get_text_embedding(self, text: str) -> Vector:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[Vector]:
        return embed_texts(self._encoder, texts)

    def _get_image_embedding(self, img_file_path: ImageFile) -> Vector:
        return self._get_image_embeddings([img_file_path])[0]

    def _get_image_embeddings(self, img_file_paths: Sequence[ImageFile]) -> list[Vector]:
        images = [file.getvalue() if isinstance(file, BytesIO) else file for file in img_file_paths]
        return lists(self._encoder.encode_items([Item.of(image=image) for image in images]))

    async def _aget_query_embedding(self, query: str) -> Vector:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embedding(self, text: str) -> Vector:
        return await asyncio.to_thread(self._get_text_embedding, text)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Vector]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_image_embedding(self, img_file_path: ImageFile) -> Vector:
        return await asyncio.to_thread(self._get_image_embedding, img_file_path)

    async def _aget_image_embeddings(self, img_file_paths: Sequence[ImageFile]) -> list[Vector]:
        return await asyncio.to_thread(self._get_image_embeddings, img_file_paths)
