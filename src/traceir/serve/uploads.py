"""Images that arrive in a request: as base64, by the id of an indexed item, or by address where a host is allowed.

No text of a client ever becomes a path. The only files read are those that an index names and that lie in the folders the
operator gave; an image from a request carries no name, so nothing a client says is stored where a path would be looked for.
What can be known without decoding is checked here; who encodes an image decodes it, once.
"""

from __future__ import annotations

import asyncio
import binascii
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from traceir.errors import ImageError, InputError
from traceir.images import ImageInput, ImageLimits
from traceir.index.store import Index
from traceir.serve.fair import Turns

LIMITS: Final = ImageLimits(pixels=32_000_000, file_bytes=16 * 1024 * 1024)  # smaller than at the command line
DECODERS: Final = 2  # images decoded at a time to be shown, which bounds memory whatever is asked for
_STANDARD: Final = str.maketrans("-_", "+/", " \t\r\n")
_PIECE: Final = 256 * 1024
_DATA_URL = re.compile(r"data:([A-Za-z0-9!#$&^_.+/-]*)((?:;[A-Za-z0-9!#$&^_.+=-]*)*),", re.ASCII | re.IGNORECASE)


class Fetches(Protocol):
    """What gets images by address (fetch.Fetcher)."""

    async def fetch(self, url: str) -> ImageInput: ...


@dataclass(frozen=True, slots=True)
class Sources:
    """Where a request's images may come from: the caller's own part of the index, folders of its files, hosts."""

    index: Index | None = None
    folders: Sequence[Path] = ()
    fetcher: Fetches | None = None


class UploadValidator:
    """Validates the images of requests; one for a server, so that its bound on decoding holds for all requests together."""

    def __init__(self, limits: ImageLimits = LIMITS, decoders: int = DECODERS) -> None:
        self.limits = limits
        self._gate = Turns(decoders)

    async def take(self, told: object, place: str, sources: Sources) -> ImageInput:
        """The image that `{"data": ...}`, `{"item": ...}` or `{"url": ...}` stands for.

        `place` names it in messages ("image", "parts[2]"). Raises InputError, and ImageError for what is no image.
        """
        if not isinstance(told, Mapping) or len(told) != 1 or not told.keys() <= {"data", "item", "url"}:
            raise InputError(f'{place} names no single image; give {{"data": base64}}, {{"item": id}} or {{"url": address}}')
        [(kind, value)] = told.items()
        if not isinstance(value, str):
            raise InputError(f"{place}.{kind} is {type(value).__name__}, not a text")
        if kind == "item":
            return await asyncio.to_thread(lambda: self._checked(image_of_item(value, place, sources), place))
        if kind == "data":
            return await asyncio.to_thread(lambda: self._of_bytes(bytes_of_base64(value, place, self.limits), place))
        if sources.fetcher is None:
            raise InputError(f'{place}.url: this server fetches no images by address; send {{"data": base64}}')
        return await sources.fetcher.fetch(value)

    @asynccontextmanager
    async def decoding(self) -> AsyncIterator[None]:
        """Held by whoever decodes an image to show it, a bounded number at a time."""
        async with self._gate.turn():
            yield

    async def check_bytes(self, data: bytes, place: str) -> ImageInput:
        """An image from the bytes of a file; ImageError where it is none."""
        return await asyncio.to_thread(self._of_bytes, data, place)

    def _of_bytes(self, data: bytes, place: str) -> ImageInput:
        if len(data) > self.limits.file_bytes:
            raise ImageError(f"{place} has {len(data)} bytes, more than {self.limits.file_bytes}; send a smaller image")
        return self._checked(ImageInput.from_bytes(data), place)

    def _checked(self, image: ImageInput, place: str) -> ImageInput:
        with without_paths([image], f"{place}: "):
            image.check(self.limits)
        return image


def bytes_of_base64(text: str, place: str, limits: ImageLimits = LIMITS) -> bytes:
    """What stands in base64 (either alphabet, padded or not, white space ignored) or in a `data:` URL; not decoded yet.

    Its size is checked before anything is decoded. Raises InputError for what is not base64, ImageError for too many bytes.
    """
    most = limits.file_bytes * 4 // 3 + limits.file_bytes // 32 + 1024  # line ends and the head of a data URL included
    if len(text) > most:
        raise ImageError(f"{place} has {len(text)} characters of base64, more than {most}; send a smaller image")
    if text[:5].lower() == "data:":
        text = _body_of(text, place)
    if not text.isascii():
        raise InputError(f"{place} is not base64: it holds characters beyond ASCII")
    plain = (text.translate(_STANDARD) if any(one in text for one in "-_ \t\r\n") else text).rstrip("=")
    try:
        if "=" in plain:
            raise binascii.Error("'=' within it")
        data = b"".join(_decoded(plain))
    except binascii.Error as error:
        raise InputError(f"{place} is not base64 ({error}); send an image file in base64, or a data: URL") from error
    if not data:
        raise InputError(f"{place} is empty; send an image file in base64, or a data: URL")
    return data


def _decoded(plain: str) -> Iterator[bytes]:
    """Piece by piece, so that other threads run between them."""
    for place in range(0, len(plain), _PIECE):
        piece = plain[place : place + _PIECE]
        yield binascii.a2b_base64(piece + "=" * (-len(piece) % 4), strict_mode=True)


def _body_of(text: str, place: str) -> str:
    head = _DATA_URL.match(text[:256])
    if head is None or ";base64" not in head[2].lower():
        raise InputError(f"{place} is a data: URL without base64; send data:image/png;base64,... or base64 alone")
    kind = head[1].lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise InputError(f"{place} is a data: URL of type {kind[:40]!r}, which is no image")
    return text[head.end() :]


def image_of_item(id: str, place: str, sources: Sources) -> ImageInput:
    """The image of an item the caller can see. InputError where there is no such item, or none with an image."""
    if sources.index is None:
        raise InputError(f"{place}.item: this server has no index; send the image itself")
    stored = sources.index.get([id]).get(id)
    if stored is None or stored.image is None:
        raise InputError(f"{place}.item: there is no item {id[:80]!r} with an image")
    return image_in_folders(stored.image, sources.folders, id)


def image_in_folders(image: str, folders: Sequence[Path], id: str) -> ImageInput:
    """The file that an index names as an item's image, only where it lies in one of the folders, links followed.

    A relative name is looked for in each of them. What is no image is found out when it is read, whatever its name.
    InputError names the item, never the path.
    """
    roots = [folder.resolve() for folder in folders]
    candidates = [Path(image)] if Path(image).is_absolute() else [root / image for root in roots]
    for candidate in candidates if "\0" not in image else ():
        try:
            real = candidate.resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            continue
        if real.is_file() and any(real.is_relative_to(root) for root in roots):
            return ImageInput.open(real)
    raise InputError(f"the image of item {id[:80]!r} is not among the server's images any more")


@contextmanager
def without_paths(images: Iterable[ImageInput], before: str = "") -> Iterator[None]:
    """What goes wrong with these images within is told to a client without their paths, and without remedies that only the
    server has; also where a file fails after it was checked. `before`: what the message begins with."""
    try:
        yield
    except ImageError as error:
        message = str(error)
        for image in images:
            message = message if image.path is None else message.replace(str(image.path), "of the item")
        raise ImageError(before + re.sub(r"or raise ImageLimits\.\w+", "to less", message)) from error
