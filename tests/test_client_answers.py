"""The client over a running server: vectors, searches, additions and refusals as the encoder and the index give them here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from conftest import image_of
from fake_sglang import serving_here

from traceir.client import Added, Client
from traceir.encoder import Encoder
from traceir.errors import InputError, ModelError
from traceir.images import ImageInput
from traceir.items import Encoding, Item, Query
from traceir.serve.keys import make_key

TEXTS = ["a red kettle", "a green kettle", "a blue kettle then a lid"]
INDIRECT = "Left: a blue ball; middle: a mug in the colour of the left one."


@pytest.fixture(scope="module")
def door(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A server's address, and a key to it."""
    items = [Item.of(text=text, id=f"k{index}", fields={"shelf": index % 2, "rank": "oak"}) for index, text in enumerate(TEXTS)]
    folder = tmp_path_factory.mktemp("adapters")
    key = make_key(folder / "keys", "adapters", scopes=("read", "write"))
    with serving_here(folder / "index", encoder, keys=folder / "keys") as url, Client(url, key) as client:
        client.add(items)
        yield url, key


@pytest.fixture
def client(door: tuple[str, str]) -> Iterator[Client]:
    with Client(*door, pause_s=0.01) as made:
        yield made


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "kettle.png"
    image_of(1).load().save(path)
    return str(path)


def rows(encodings: list[Encoding]) -> Any:
    return pytest.approx(np.stack([encoding.vector for encoding in encodings]), abs=1e-5)


def test_the_client_keeps_order_over_many_requests_and_kinds(client: Client, encoder: Encoder, photo: str) -> None:
    shown = ImageInput.open(photo)
    queries = [Query.of(text=f"kettle {index}", instruction="find it" if index % 3 else None) for index in range(70)]
    queries[30] = Query((shown, "left", shown, "right"), target="image")
    queries[31] = Query.of(text="then red", image=shown, target="image")
    embedded = client.embed_queries(queries, route="direct")
    assert np.stack([encoding.vector for encoding in embedded]) == rows(encoder.encode_queries(queries, route="direct"))
    [served], [own] = client.embed_queries([Query.of(text=INDIRECT)]), encoder.encode_queries([Query.of(text=INDIRECT)])
    assert served.reasoning == own.reasoning and served.tokens == own.tokens > 0
    assert client.embed_items([]) == [] and client.model.width == encoder.width


def test_the_client_adds_searches_pages_and_deletes(client: Client, photo: str) -> None:
    image = ImageInput.open(photo)
    items = [Item.of(image=image, id="p1"), Item.of(text="a spoon", id="s1", fields={"shelf": 7})]
    assert client.add(items) == [Added("p1", "added", None), Added("s1", "added", None)]
    result = client.search(Query.of(image=image, target="image"), route="direct")
    assert [(hit.id, hit.rank) for hit in result.hits] == [("p1", 1)] and (result.route, result.more) == ("direct", False)
    pages = [client.search(Query.of(text="a spoon"), k=2, offset=offset).hits for offset in (0, 2)]
    assert [hit.rank for page in pages for hit in page] == [1, 2, 3, 4] and len({hit.id for hit in (*pages[0], *pages[1])}) == 4
    assert [hit.id for hit in client.search(Query.of(text="a spoon"), where={"shelf": 7}).hits] == ["s1"]
    assert client.search(Query.of(text=INDIRECT), k=1, route="reason").reasoning
    assert client.delete(["p1", "s1", "never"]) == 2


def test_the_client_says_what_went_wrong(door: tuple[str, str], client: Client) -> None:
    url, key = door
    asked = [Query.of(text="a")]
    with Client(url, "tir_wrong") as stranger, pytest.raises(ModelError, match=r"refuses the API key \(401"):
        stranger.embed_queries(asked)
    with pytest.raises(InputError, match=r"refuses the request \(400"):
        client.search(asked[0], k=0)
    with Client(f"{url}/elsewhere", key) as astray, pytest.raises(InputError, match=r"refuses the request \(404"):
        astray.embed_queries(asked)
    client.close()
    with pytest.raises(ModelError, match="closed"):
        client.embed_queries(asked)
