"""TraceIR: universal multimodal retrieval that reasons when a query needs it (an implementation of TRACE, arXiv 2603.02929).

    from traceir import Encoder, Item, Query, Searcher, open_index

    encoder = Encoder.from_pretrained()
    with open_index("things.index", encoder, create=True) as index:
        searcher = Searcher(encoder, index)
        searcher.add([Item.of(image="ring.jpg", id="ring"), Item.of(text="A red ring.", id="note")])
        print(searcher.search(Query.of(image="ring.jpg", text="Make it blue.")).hits)

Each name is imported at its first use, so that `import traceir` is cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

if TYPE_CHECKING:
    from traceir.client import Client
    from traceir.encoder import Encoder
    from traceir.errors import TraceError
    from traceir.images import ImageInput
    from traceir.index import And, Eq, Glob, In, Not, Or, Range, open_index
    from traceir.items import Encoding, Hit, Item, Query
    from traceir.library import load_encoder
    from traceir.retrieval.search import Searcher

__version__ = "0.1.0"
__all__ = [
    "And", "Client", "Encoder", "Encoding", "Eq", "Glob", "Hit", "ImageInput", "In", "Item", "Not", "Or", "Query", "Range",
    "Searcher", "TraceError", "load_encoder", "open_index",
]  # fmt: skip
_HOMES = {
    **dict.fromkeys(("And", "Eq", "Glob", "In", "Not", "Or", "Range", "open_index"), "traceir.index"),
    **dict.fromkeys(("Encoding", "Hit", "Item", "Query"), "traceir.items"),
    "Client": "traceir.client",
    "Encoder": "traceir.encoder",
    "ImageInput": "traceir.images",
    "Searcher": "traceir.retrieval.search",
    "load_encoder": "traceir.library",
    "TraceError": "traceir.errors",
}


def __getattr__(name: str) -> Any:
    if name == "Picture":
        warn("traceir.Picture is now called traceir.ImageInput", DeprecationWarning, stacklevel=2)
        return __getattr__("ImageInput")
    if name not in _HOMES:
        raise AttributeError(f"module 'traceir' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
