"""Where a Milvus index is, and the client of it."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from traceir.errors import StoreError
from traceir.index import store
from traceir.index.store import Opening
from traceir.items import Modality

GRAPHS: Final[dict[Modality, str]] = {"text": "_near_text", "image": "_near_image", "image,text": "_near_both"}
BACKGROUND: Final = "_background"
"""Endings of the names of an index's other collections."""
_NAME: Final = "traceir"


@dataclass(frozen=True, slots=True)
class MilvusAddress:
    """Where an index is: what a client connects to, the collection, and how messages name it (without the token)."""

    uri: str
    name: str
    shown: str
    token: str = ""
    file: Path | None = None


def parse_address(uri: str) -> MilvusAddress:
    """`milvus-lite:PATH.db[/NAME]` or `http[s]://[USER:PASSWORD@]HOST[:PORT][/NAME]`; StoreError for what is neither.

    The environment variable TRACEIR_MILVUS_TOKEN keeps a token off the command line.
    """
    if match := re.fullmatch(r"milvus-lite:(.+?\.db)(?:/([^/]+))?", uri):
        address = MilvusAddress(match[1], match[2] or _NAME, uri, file=Path(match[1]))
    elif match := re.fullmatch(r"(https?://)(?:([^/@]+)@)?([^/@]+)(?:/([^/]*))?", uri):
        token, name = match[2] or os.environ.get("TRACEIR_MILVUS_TOKEN", ""), match[4] or _NAME
        address = MilvusAddress(match[1] + match[3], name, f"{match[1]}{match[3]}/{name}", token)
    else:  # which may hold a password
        raise StoreError(
            "the index's address is none of Milvus: give milvus-lite:FILE, which ends in .db, or http://HOST:19530/NAME"
        )
    own = (*GRAPHS.values(), BACKGROUND)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", address.name, re.ASCII) or address.name.endswith(own):
        what = f"index {address.shown} has the name {address.name!r}"
        raise StoreError(f"{what}; use up to 200 letters, digits and _, and no ending of our own")
    return address


def connect(address: MilvusAddress, opening: Opening) -> Any:
    try:
        from pymilvus import MilvusClient
        from pymilvus.exceptions import MilvusException
    except ImportError as error:
        raise StoreError(f"index {address.shown} needs pymilvus; install it with `pip install 'traceir[milvus]'`") from error
    # They log each refusal with a traceback before they raise it; Milvus Lite in this process also logs what it does not do.
    for name in ("pymilvus", "milvus_lite", *(["grpc._server"] if address.file else [])):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if address.file is not None:
        store.prepare_file(address.file, address.shown, opening.create, Path.exists)
    try:
        return MilvusClient(address.uri, token=address.token, timeout=opening.timeout, dedicated=True)
    except MilvusException as error:
        remedy = "check that the server runs and that address and token are right"
        if address.file is not None:
            remedy = "another process may hold it (one can), it is no file of Milvus Lite, or milvus-lite is not installed"
        raise StoreError(f"index {address.shown} cannot be opened ({first_line(error)}); {remedy}") from error


def first_line(error: Exception) -> str:
    text = str(getattr(error, "message", "") or error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
