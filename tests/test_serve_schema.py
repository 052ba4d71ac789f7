"""The OpenAPI document and the server agree: schemathesis makes requests from it and holds the answers against it."""

from __future__ import annotations

import base64
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import torch
import uvicorn
from PIL import Image

from traceir.encoder import Encoder
from traceir.serve.access import Limits
from traceir.serve.keys import make_key
from traceir.serve.limits import Rate
from traceir.serve.run import ServeConfig, make_application, make_server

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is not installed

from benchmarks.hostile import schema_config, try_operation

pytestmark = pytest.mark.slow

EXAMPLES = 25
RED = BytesIO()
Image.new("RGB", (12, 8), "red").save(RED, "PNG")
IMAGE = base64.b64encode(RED.getvalue()).decode()
CUP = {"id": "cup", "text": "a red cup", "image": {"data": IMAGE}, "fields": {"shelf": 2.5}}
GOOD: dict[str, dict[str, Any]] = {
    "GET /health": {},
    "GET /ready": {},
    "GET /metrics": {},
    "GET /v1/models": {},
    "GET /v1/models/{id}": {"path_parameters": {"id": "traceir"}},
    "POST /items": {"body": {"items": [CUP, {"id": "a/b", "text": "a red cup"}, {"id": "nothing"}]}},
    "POST /v1/embeddings": {"body": {"input": ["a red cup", {"image": IMAGE}], "encoding_format": "base64"}},
    "POST /search": {"body": {"image": {"data": IMAGE}, "text": "the same in blue", "k": 3.0, "where": {"shelf": [1, 2.5]}}},
    "POST /search/stream": {"body": {"parts": ["a red cup", {"item": "cup"}], "modality": "text"}},
    "GET /items": {"query": {"limit": 1}},
    "GET /items/{id}": {"path_parameters": {"id": "a/b"}},
    "GET /pictures/{name}": {"path_parameters": {"name": "Y3Vw"}, "query": {"side": 16}},
    "GET /page/config": {},
    "DELETE /items/{id}": {"path_parameters": {"id": "a/b"}},
    "DELETE /items": {"body": {"ids": ["cup", "nowhere"]}},
}
"""A request of each operation that is granted, in an order that makes it so."""


@dataclass(frozen=True)
class Tried:
    """An application in this process, with keys, and without a limit on wrong ones: its document, and the headers of a caller."""

    document: schemathesis.BaseSchema
    headers: dict[str, str]

    def operation(self, label: str) -> schemathesis.APIOperation:
        method, path = label.split()
        return self.document[path][method]

    def ask(self, case: schemathesis.Case) -> None:
        """Raises where the answer is not as documented."""
        case.call_and_validate(headers=self.headers)


@pytest.fixture(autouse=True)
def subnormal_numbers() -> None:
    """Hypothesis wants them; what trains or measures in this process before may have switched them off."""
    torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def tried(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tried]:
    folder = tmp_path_factory.mktemp("schema")
    key = make_key(folder / "keys.json", "all", scopes=("read", "write"))
    config = ServeConfig(str(folder / "index"), keys=folder / "keys.json")
    server = make_server(config, lambda: encoder)
    server.limits = Limits(None, None, Rate(1e6, 1e6))
    options = uvicorn.Config(make_application(config, server), host="127.0.0.1", port=0, log_level="error")
    running = uvicorn.Server(options)
    thread = threading.Thread(target=running.run)
    thread.start()
    while server.service is None or not running.started:
        assert server.failed is None and thread.is_alive()
        time.sleep(0.05)
    port = running.servers[0].sockets[0].getsockname()[1]
    judged = schema_config(seed=0, strangers=True)
    document = schemathesis.openapi.from_url(f"http://127.0.0.1:{port}/openapi.json", config=judged)
    yield Tried(document, {"Authorization": f"Bearer {key}"})
    running.should_exit = True
    thread.join()


def test_the_document_names_every_operation_and_which_need_a_key(tried: Tried) -> None:
    paths = tried.document.raw_schema["paths"]
    told = {f"{method.upper()} {path}": one for path, methods in paths.items() for method, one in methods.items()}
    assert set(told) == set(GOOD)
    assert {label for label, one in told.items() if one.get("security") != [{"key": []}]} == {"GET /health", "GET /ready"}
    assert not any("422" in one["responses"] for one in told.values())


@pytest.mark.parametrize("label", GOOD)
def test_what_is_granted_is_as_documented(tried: Tried, label: str) -> None:
    case = tried.operation(label).Case(**GOOD[label])
    assert case.call_and_validate(headers=tried.headers).status_code == 200


@pytest.mark.parametrize("label", GOOD)
def test_whatever_is_asked_the_answer_is_as_documented(tried: Tried, label: str) -> None:
    try_operation(tried.operation(label), EXAMPLES, tried.ask)
