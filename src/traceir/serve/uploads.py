"""Images of requests: as base64, by the id of an indexed item, or by address where a host is allowed; and files of those kept.

No text of a client ever becomes a path. The only files read are those that an index names and that lie in the folders the
operator gave; an image from a request carries no name, so nothing a client says is stored where a path would be looked for.
What can be known without decoding is checked here; who encodes an image decodes it, once.
"""

from __future__ import annotations

import asyncio
import binascii
import contextlib
import hashlib
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Final, Protocol

from traceir.errors import ImageError, InputError, StoreError
from traceir.files import sync_folder, write_whole
from traceir.images import DEFAULT_LIMITS, ImageInput, ImageLimits, file_bytes
from traceir.index.store import Index
from traceir.media.part import file_of, part_of
from traceir.serve.fair import Slots

LIMITS: Final = ImageLimits(pixels=32_000_000, file_bytes=16 * 1024 * 1024)  # smaller than at the command line
DECODERS: Final = 2  # images decoded at a time to be shown, which bounds memory whatever is asked for
_STANDARD: Final = str.maketrans("-_", "+/", " \t\r\n")
_PIECE: Final = 256 * 1024
LEFT_S: Final = 3600.0  # seconds after which a file that no item names is not on its way into the index any more
MAX_SIDE: Final = 2048  # pixels of the longer side of an image that is handed out, at most
_DATA_URL = re.compile(r"data:([A-Za-z0-9!#$&^_.+/-]*)((?:;[A-Za-z0-9!#$&^_.+=-]*)*),", re.ASCII | re.IGNORECASE)
_OURS = re.compile(r"[0-9a-f]{2}/[0-9a-f]{40}/\.?[0-9a-f]{64}\.[a-z]+(\.[0-9a-f]{32}|\.[0-9a-f]{8}\.new)?")


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
    """Validates the images of requests; one for a server, so that its bound on decoding holds for all requests together.

    Whoever decodes an image to show it does so within `decoders.slot()`.
    """

    def __init__(self, limits: ImageLimits = LIMITS, decoders: int = DECODERS) -> None:
        self.limits, self.decoders = limits, Slots(decoders)

    async def take(self, sent: object, location: str, sources: Sources) -> ImageInput:
        """The image that `{"data": ...}`, `{"item": ...}` or `{"url": ...}` stands for.

        `location` names it in messages ("image", "parts[2]"). Raises InputError, and ImageError for what is no image.
        """
        match sent:
            case {"data": str(data), **rest} if not rest:
                return await asyncio.to_thread(lambda: self._of_bytes(bytes_of_base64(data, location, self.limits), location))
            case {"item": str(id), **rest} if not rest:
                return await asyncio.to_thread(
                    lambda: self._checked(image_of_item(id, location, sources), location, DEFAULT_LIMITS)
                )
            case {"url": str(url), **rest} if not rest:
                if sources.fetcher is None:
                    raise InputError(f'{location}.url: this server fetches no images by address; send {{"data": base64}}')
                return await sources.fetcher.fetch(url)
        raise InputError(f'{location} names no single image; give {{"data": base64}}, {{"item": id}} or {{"url": address}}')

    async def check_bytes(self, data: bytes, location: str) -> ImageInput:
        """An image from the bytes of a file; ImageError where it is none."""
        return await asyncio.to_thread(self._of_bytes, data, location)

    def _of_bytes(self, data: bytes, location: str) -> ImageInput:
        if len(data) > self.limits.file_bytes:
            raise ImageError(f"{location} has {len(data)} bytes, more than {self.limits.file_bytes}; send a smaller image")
        return self._checked(ImageInput.from_bytes(data), location, self.limits)

    def _checked(self, image: ImageInput, location: str, limits: ImageLimits) -> ImageInput:
        with without_paths([image], f"{location}: "):
            image.check(limits)
        return image


def bytes_of_base64(text: str, location: str, limits: ImageLimits = LIMITS) -> bytes:
    """What stands in base64 (either alphabet, padded or not, white space ignored) or in a `data:` URL; not decoded yet.

    Its size is checked before anything is decoded. Raises InputError for what is not base64, ImageError for too many bytes.
    """
    most = limits.file_bytes * 4 // 3 + limits.file_bytes // 32 + 1024  # line ends and the head of a data URL included
    if len(text) > most:
        raise ImageError(f"{location} has {len(text)} characters of base64, more than {most}; send a smaller image")
    if text[:5].lower() == "data:":
        text = _body_of(text, location)
    if not text.isascii():
        raise InputError(f"{location} is not base64: it holds characters beyond ASCII")
    digits = (text.translate(_STANDARD) if any(char in text for char in "-_ \t\r\n") else text).rstrip("=")
    pieces = (digits[start : start + _PIECE] for start in range(0, len(digits), _PIECE))  # other threads run between them
    try:
        if "=" in digits:
            raise binascii.Error("'=' within it")
        data = b"".join(binascii.a2b_base64(piece + "=" * (-len(piece) % 4), strict_mode=True) for piece in pieces)
    except binascii.Error as error:
        raise InputError(f"{location} is not base64 ({error}); send an image file in base64, or a data: URL") from error
    if not data:
        raise InputError(f"{location} is empty; send an image file in base64, or a data: URL")
    return data


def _body_of(text: str, location: str) -> str:
    head = _DATA_URL.match(text[:256])
    if head is None or ";base64" not in head[2].lower():
        raise InputError(f"{location} is a data: URL without base64; send data:image/png;base64,... or base64 alone")
    kind = head[1].lower()
    if kind and not kind.startswith("image/") and kind != "application/octet-stream":
        raise InputError(f"{location} is a data: URL of type {kind[:40]!r}, which is no image")
    return text[head.end() :]


def image_of_item(id: str, location: str, sources: Sources) -> ImageInput:
    """The image of an item the caller can see. InputError where there is no such item, or none with an image."""
    if sources.index is None:
        raise InputError(f"{location}.item: this server has no index; send the image itself")
    stored = sources.index.get([id]).get(id)
    if stored is None or stored.image is None:
        raise InputError(f"{location}.item: there is no item {id[:80]!r} with an image")
    return image_in_folders(stored.image, sources.folders, id)


def image_in_folders(image: str, folders: Sequence[Path], id: str) -> ImageInput:
    """The file that an index names as an item's image, only where it lies in one of the folders, links followed.

    A relative name is looked for in each of them; a page or frame is where its file is. What is no image is found out when it is
    read, whatever its name.
    InputError names the item, never the path.
    """
    roots = [folder.resolve() for folder in folders]
    candidates = [Path(image)] if Path(image).is_absolute() else [root / image for root in roots]
    for candidate in candidates if "\0" not in image else ():
        try:
            part = part_of(candidate)
            real = (part.file if part else candidate).resolve(strict=True)
        except (OSError, RuntimeError, ValueError):
            continue
        if real.is_file() and any(real.is_relative_to(root) for root in roots):
            return ImageInput.open(f"{real}#{part.name}" if part else real)
    raise InputError(f"the image of item {id[:80]!r} is not among the server's images any more")


@contextlib.contextmanager
def without_paths(images: Iterable[ImageInput], before: str = "") -> Iterator[None]:
    """What goes wrong with these images within is told to a client without their paths, and without remedies that only the
    server has; also where a file fails after it was checked. `before`: what the message begins with."""
    try:
        yield
    except ImageError as error:
        message = str(error)
        for path in (str(image.path) for image in images if image.path is not None):
            message = message.replace(path, "of the item").replace(file_of(path), "the file of the item")
        message = re.sub(r"or raise ImageLimits\.\w+", "to less", message)
        raise ImageError(before + re.sub(r"pip install .*", "send it as JPEG or PNG", message)) from error


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """Uploaded images below `folder`: each item has a folder of its own, named by a hash of tenant and id, with one file in
    it: what was sent, named by its SHA-256. So the image of an item goes with the item, and no other's with it. `remove_unused`
    belongs to the one thread that writes the index, which calls `keep` again right before, for what was removed meanwhile.
    """

    folder: Path
    tenant: str | None = None
    locks: Sequence[Lock] = field(default_factory=lambda: [Lock() for _ in range(256)])
    """By the first two digits of an item's folder: in it either files are written, or what is unused is removed."""

    def keep(self, image: ImageInput, id: str) -> ImageInput:
        """The image as the item's own file that survives a crash; a file that is no upload stays where it is."""
        if image.path is not None and not image.path.is_relative_to(self.folder):
            return image
        data, format = image.encoded(LIMITS)
        file = self._folder_of(id) / f"{image.sha256}{format.suffixes[0]}"
        with self._lock_of(file.parent):
            if not file.exists():
                try:
                    write_whole(file, data, durable=True)
                    for folder in (file.parent.parent, self.folder):
                        sync_folder(folder)
                except OSError as error:
                    why = error.strerror or error
                    raise StoreError(f"the image cannot be kept: {why}; free the disk, send it again") from error
        return image.moved_to(file)

    def remove_unused(self, id: str, kept: str | None) -> None:
        """Removes the uploads of an item except the one that the index names."""
        folder = self._folder_of(id)
        with self._lock_of(folder):
            for file in folder.iterdir() if folder.is_dir() else ():
                if str(file) != kept:
                    file.unlink(missing_ok=True)
            if kept is None and folder.is_dir():
                folder.rmdir()

    def collect_garbage(self, named: Iterable[str | None], older_s: float = LEFT_S) -> int:
        """Removes what a server that was killed left behind: our files that no item names, of at least this age; how many.

        `named` are the images of all items that may have files here; so not for a folder that several indexes share.
        """
        kept, now, removed = set(named), time.time(), 0
        for file in self.folder.glob("*/*/*"):
            with contextlib.suppress(OSError):
                ours = _OURS.fullmatch(file.relative_to(self.folder).as_posix()) is not None
                if ours and str(file) not in kept and now - file.stat().st_mtime >= older_s:
                    file.unlink()
                    removed += 1
                    file.parent.rmdir()  # refused while another file is in it
        return removed

    def _lock_of(self, folder: Path) -> Lock:
        return self.locks[int(folder.parent.name, 16)]

    def _folder_of(self, id: str) -> Path:
        owner = hashlib.sha256(f"{self.tenant or ''}\0{id}".encode()).hexdigest()[:40]
        return self.folder / owner[:2] / owner


def as_jpeg(image: ImageInput, side: int = MAX_SIDE) -> bytes:
    """The image as JPEG, its longer side at most `side` pixels: an upload, or a file of the operator's. Raises ImageError."""
    try:
        return file_bytes(image.load(shrink_to=side), side=side)
    except OSError as error:
        raise ImageError(f"the image cannot be shown: {error}; add it anew") from error
