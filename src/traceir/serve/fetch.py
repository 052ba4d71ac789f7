"""Images by address, where the operator has named the host: fetched without ever reaching another host or an internal address.

The host must be on an exact list of names. It is resolved once, every address must be public, and the connection goes to one of
them (no DNS rebinding); TLS and the Host header use the name. A redirect passes all of this again. Proxy variables are ignored.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import httpx2

from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.serve.fair import Slots
from traceir.serve.uploads import UploadValidator

log = logging.getLogger(__name__)
MAX_URL: Final = 2048
PORTS: Final = {"https": 443, "http": 80}
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # name and port to addresses
_HOST = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_ENTRY = re.compile(r"(?:(https?)://)?([^:]*)(?::(\d{1,5}))?", re.ASCII)
_NUMBER = re.compile(r"(.*\.)?(\d+|0x[0-9a-f]*)")
_URL = re.compile(r"[!-\[\]-~]+")  # printable ASCII but for space and backslash
_PLAIN: Final = {"Accept-Encoding": "identity", "Connection": "close"}
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_CLOSED: Final = [
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 192.88.99.0/24 "
        "192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 168.63.129.16/32 ::/96 "
        "64:ff9b:1::/48 100::/64 2001::/23 2001:db8::/32 2002::/16 3fff::/20 5f00::/16 fc00::/7 fe80::/10 fec0::/10 ff00::/8"
    ).split()
]
"""What the standard library calls global in one version or another, and is not a public host all the same."""


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """`seconds` is for all of one image, redirects included, `connect_seconds` for one address; `at_once` for the server."""

    file_bytes: int = 16 * 1024 * 1024
    seconds: float = 15.0
    connect_seconds: float = 5.0
    redirects: int = 2
    at_once: int = 8


class Fetcher:
    """Fetches images from an exact list of hosts.

    A host is `name[:port]`, by HTTPS, or `http://name[:port]`, never an address in numbers. `resolve` and `transport`: for tests.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        limits: FetchLimits | None = None,
        validator: UploadValidator | None = None,
        resolve: Resolve | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        self._limits, self._validator = limits or FetchLimits(), validator or UploadValidator()
        self._allowed = frozenset(_read_host(host) for host in hosts)
        self._resolve = resolve or _resolve
        self._transport = transport or httpx2.AsyncHTTPTransport(
            verify=ssl.create_default_context(), trust_env=False, limits=httpx2.Limits(max_keepalive_connections=0)
        )
        self._slots = Slots(self._limits.at_once)

    async def fetch(self, url: str) -> ImageInput:
        """The image at an address. InputError where it is not allowed or cannot be had, ImageError where it is no image.

        The messages name the host that was asked for and nothing learnt about the network behind the server.
        """
        target = self.check(url)
        try:
            async with asyncio.timeout(self._limits.seconds), self._slots.slot():
                data = await self._follow(target)
        except TimeoutError as error:
            raise InputError(f"{target.host} did not send the image within {self._limits.seconds:g} seconds") from error
        return await self._validator.check_bytes(data, f"what {target.host} sent")

    def check(self, url: str) -> httpx2.URL:
        """The address, or InputError where its form, scheme, host or port is not allowed. Nothing is resolved."""
        if not isinstance(url, str) or len(url) > MAX_URL or not _URL.fullmatch(url):
            raise InputError(f"the address of an image is not a plain ASCII URL of at most {MAX_URL} characters")
        try:
            read = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise InputError(f"the address of an image cannot be read: {error}") from error
        if read.scheme not in PORTS or read.userinfo:
            raise InputError("the address of an image must begin with https:// and hold no user name")
        if (read.scheme, read.host, read.port or PORTS[read.scheme]) not in self._allowed:
            named = ", ".join(sorted({name for _, name, _ in self._allowed})) or "none"
            raise InputError(f"images may not be fetched from this host, scheme and port; allowed hosts: {named}")
        return read

    async def _follow(self, target: httpx2.URL) -> bytes:
        for _ in range(self._limits.redirects + 1):
            answer = await self._get(target, await self._addresses(target))
            if isinstance(answer, bytes):
                return answer
            try:
                target = self.check(str(target.join(answer)))
            except (InputError, httpx2.InvalidURL) as error:
                raise InputError(f"{target.host} redirects to where images may not be fetched from") from error
        raise InputError(f"{target.host} redirects more than {self._limits.redirects} times; give the last address")

    async def _addresses(self, target: httpx2.URL) -> Sequence[str]:
        """All addresses of a host; InputError where one of them is not public."""
        try:
            addresses = await self._resolve(target.host, target.port or PORTS[target.scheme])
        except (OSError, UnicodeError) as error:
            log.info("%s cannot be resolved: %s", target.host, error)
            raise InputError(f"{target.host} has no address; check its name") from error
        if not addresses or not all(map(is_public, addresses)):
            log.warning("%s resolves to %s, not fetched", target.host, ", ".join(addresses) or "nothing")
            raise InputError(f"{target.host} has an address that is not public; images are not fetched from such hosts")
        return addresses

    async def _get(self, target: httpx2.URL, addresses: Sequence[str]) -> bytes | str:
        """The body of a 200, or where a redirect leads to, from the first address that answers."""
        headers = {"Host": target.netloc.decode(), "User-Agent": "traceir", "Accept": "image/*", **_PLAIN}
        options = {"sni_hostname": target.host, "timeout": {"connect": self._limits.connect_seconds}}
        for address in addresses:
            try:
                answer = await self._transport.handle_async_request(
                    httpx2.Request("GET", target.copy_with(host=address), headers=headers, extensions=options)
                )
                try:
                    return await self._read(target, answer)
                finally:
                    await answer.aclose()
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                log.info("%s at %s does not answer: %s", target.host, address, error)
            except httpx2.TransportError as error:
                log.info("%s at %s broke off: %s", target.host, address, error)
                raise InputError(f"{target.host} sent no whole answer; try again, or send the image itself") from error
        raise InputError(f"{target.host} does not answer; try again, or send the image itself")

    async def _read(self, target: httpx2.URL, answer: httpx2.Response) -> bytes | str:
        most, host, location = self._limits.file_bytes, target.host, answer.headers.get("location")
        if answer.status_code in _REDIRECTS and location is not None:
            return str(location)
        if answer.status_code != 200:
            raise InputError(f"{host} answered with status {answer.status_code}; check the address of the image")
        if answer.headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise InputError(f"{host} sent the image packed although it was asked not to; send the image itself")
        body = bytearray()
        async for piece in answer.aiter_raw():
            body += piece
            if len(body) > most:
                raise InputError(f"the image at {host} has more than {most} bytes; send a smaller one")
        return bytes(body)


def is_public(address: str) -> bool:
    """Whether an address is public, in its standard form and without a zone; IPv4 within IPv6 is judged by itself."""
    try:
        read = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(read, ipaddress.IPv6Address):
        inner = read.ipv4_mapped or (ipaddress.IPv4Address(int(read) & 0xFFFF_FFFF) if read in _NAT64 else None)
        if inner is not None or read.scope_id is not None:
            return read.scope_id is None and is_public(str(inner))
    closed = any(read in network for network in _CLOSED if network.version == read.version)
    return not closed and read.is_global and not read.is_multicast and not read.is_reserved


def _read_host(text: str) -> tuple[str, str, int]:
    """Scheme, name and port of an entry of the list; InputError where it is not exactly one host."""
    entry = _ENTRY.fullmatch(text.strip().lower())
    scheme, name, port = (entry[1] or "https", entry[2], int(entry[3] or PORTS[entry[1] or "https"])) if entry else ("", "", 0)
    if not 1 <= port <= 65_535 or not _HOST.fullmatch(name) or _NUMBER.fullmatch(name):
        raise InputError(f"host {text[:200]!r} is unusable; give one exact public name, images.example.org, without wildcards")
    return scheme, name, port


async def _resolve(host: str, port: int) -> list[str]:
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in entries))
