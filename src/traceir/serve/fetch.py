"""Pictures by address, where the operator has named the host: fetched without ever reaching another host or an internal address.

The host must be on an exact list of names. It is resolved here, every address must be public, and the connection goes to one of
exactly these addresses, so that a name that resolves differently a moment later (DNS rebinding) changes nothing; TLS and the Host
header still use the name. A redirect is a new address that passes all of this again. Proxy variables are ignored.
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
from urllib.parse import SplitResult, urljoin, urlsplit

from traceir.errors import InputError
from traceir.images import ImageInput
from traceir.serve.fair import Turns
from traceir.serve.uploads import Intake

log = logging.getLogger(__name__)
MAX_URL: Final = 2048
PORTS: Final = {"https": 443, "http": 80}
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Name and port to addresses."""
Connect = Callable[[str, int, str | None], Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
"""Address, port, and the name for TLS (None: no TLS) to a connection."""
_HOST = re.compile(r"(?=.{1,253}$)([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?\.)*[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"(\d+|0x[0-9a-f]*)")
_URL = re.compile(r"[!-\[\]-~]+")
"""Printable ASCII but for space and backslash."""
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
# What the standard library calls global in one version or another, and is not a public host all the same.
_CLOSED: Final = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
        "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
        "224.0.0.0/4", "240.0.0.0/4", "168.63.129.16/32", "100.100.100.200/32",
        "::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16",
        "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """`seconds` is for all of one picture, redirects included, `connect_seconds` for one address; `at_once` for the server."""

    file_bytes: int = 16 * 1024 * 1024
    seconds: float = 15.0
    connect_seconds: float = 5.0
    redirects: int = 2
    at_once: int = 8


@dataclass(frozen=True, slots=True)
class Target:
    """An address that passed the list: where to connect, and what to ask for there."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}{self.path}"


class Fetcher:
    """Fetches pictures from an exact list of hosts.

    A host is a name (`images.example.org`: HTTPS, port 443), a name with a port (HTTPS on it), or `http://name[:port]`, which
    allows that one without TLS. Addresses in numbers are refused. `resolve` and `connect` are for tests.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        limits: FetchLimits | None = None,
        intake: Intake | None = None,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
    ) -> None:
        self._limits = limits or FetchLimits()
        self._intake = intake or Intake()
        self._allowed = frozenset(_read_host(host) for host in hosts)
        self._resolve, self._connect = resolve or _resolve, connect or _connect
        self._gate = Turns(self._limits.at_once)

    async def fetch(self, url: str) -> ImageInput:
        """The picture at an address, decoded once to see that it is one.

        Raises InputError where the address is not allowed or cannot be had, PictureError where it is no picture. The messages
        name the host that was asked for and nothing learnt about the network behind the server; the log has the rest.
        """
        target = self.check(url)
        try:
            async with asyncio.timeout(self._limits.seconds), self._gate.turn():
                data = await self._follow(target)
        except TimeoutError as error:
            raise InputError(f"{target.host} did not send the picture within {self._limits.seconds:g} seconds") from error
        return await self._intake.check_bytes(data, f"what {target.host} sent")

    def check(self, url: str) -> Target:
        """The address in parts, or InputError where its form, scheme, host or port is not allowed. Nothing is resolved."""
        if not isinstance(url, str) or len(url) > MAX_URL or not _URL.fullmatch(url):
            raise InputError(f"the address of a picture is not a plain ASCII URL of at most {MAX_URL} characters")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError(f"the address of a picture cannot be read: {error}") from error
        scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
        if scheme not in PORTS or "@" in parts.netloc:
            raise InputError("the address of a picture must begin with https:// and hold no user name")
        port = PORTS[scheme] if port is None else port
        if (scheme, host, port) not in self._allowed:
            named = ", ".join(sorted({name for _, name, _ in self._allowed})) or "none"
            raise InputError(f"pictures may not be fetched from this host, scheme and port; allowed hosts: {named}")
        return Target(scheme, host, port, _path_of(parts))

    async def _follow(self, target: Target) -> bytes:
        for _ in range(self._limits.redirects + 1):
            answer = await self._get(target)
            if isinstance(answer, bytes):
                return answer
            target = self._redirected(target, answer)
        raise InputError(f"{target.host} redirects more than {self._limits.redirects} times; give the last address")

    def _redirected(self, target: Target, location: str) -> Target:
        try:
            return self.check(urljoin(target.url, location))
        except ValueError as error:  # InputError is one too
            raise InputError(f"{target.host} redirects to where pictures may not be fetched from") from error

    async def _get(self, target: Target) -> bytes | str:
        """The body of a 200, or where a redirect leads to."""
        reader, writer = await self._open(target)
        try:
            return await self._talk(target, reader, writer)
        except (OSError, ssl.SSLError, asyncio.IncompleteReadError) as error:
            log.info("%s broke off: %s", target.url, error)
            raise InputError(f"{target.host} broke off the connection; try again, or send the picture itself") from error
        finally:
            writer.close()

    async def _open(self, target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the first address that answers; none is tried where one of them is not public."""
        try:
            addresses = list(await self._resolve(target.host, target.port))
        except (OSError, UnicodeError) as error:
            log.info("%s cannot be resolved: %s", target.host, error)
            raise InputError(f"{target.host} has no address; check its name") from error
        closed = [address for address in addresses if not is_public(address)]
        if closed or not addresses:
            log.warning("%s resolves to %s, not fetched", target.host, ", ".join(addresses) or "nothing")
            raise InputError(f"{target.host} has an address that is not public; pictures are not fetched from such hosts")
        name = target.host if target.scheme == "https" else None
        for address in addresses:
            try:
                async with asyncio.timeout(self._limits.connect_seconds):
                    return await self._connect(address, target.port, name)
            except (OSError, TimeoutError) as error:
                log.info("%s at %s does not answer: %s", target.host, address, error)
        raise InputError(f"{target.host} does not answer; try again, or send the picture itself")

    async def _talk(self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes | str:
        import h11

        connection = h11.Connection(h11.CLIENT)
        host = target.host if target.port == PORTS[target.scheme] else f"{target.host}:{target.port}"
        asked = [("Host", host), ("User-Agent", "traceir"), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
        request = h11.Request(method="GET", target=target.path, headers=[*asked, ("Connection", "close")])
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        parts: list[bytes] = []
        received, held, status = 0, 0, 0
        most = self._limits.file_bytes
        try:
            while True:
                event = connection.next_event()
                if event is h11.NEED_DATA:
                    data = await reader.read(65_536)
                    received += len(data)
                    if received > most * 2 + 262_144:  # framing and interim answers count too
                        raise InputError(f"{target.host} sends more than a picture of {most} bytes needs")
                    connection.receive_data(data)
                elif isinstance(event, h11.Response):
                    status = event.status_code
                    found = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
                    if status in _REDIRECTS and "location" in found:
                        return found["location"]
                    _check_answer(target, status, found, most)
                elif isinstance(event, h11.Data):
                    held += len(event.data)
                    if held > most:
                        raise InputError(f"the picture at {target.host} has more than {most} bytes; send a smaller one")
                    parts.append(bytes(event.data))
                elif isinstance(event, h11.EndOfMessage):
                    return b"".join(parts)
                elif isinstance(event, h11.ConnectionClosed) or event is h11.PAUSED:
                    raise InputError(f"{target.host} sent no whole answer; try again, or send the picture itself")
        except h11.RemoteProtocolError as error:
            log.info("%s does not speak HTTP/1.1: %s", target.url, error)
            raise InputError(f"{target.host} sent no whole answer; try again, or send the picture itself") from error


def is_public(address: str) -> bool:
    """Whether an address in its standard form is one of the public network; forms in other numbers, and zones, are not.

    An IPv4 address inside an IPv6 one (mapped, NAT64) is judged by itself; 6to4, Teredo and IPv4-compatible ones are refused.
    """
    try:
        read = ipaddress.ip_address(address)
    except ValueError:
        return False
    if isinstance(read, ipaddress.IPv6Address):
        if read.scope_id is not None:
            return False
        inner = read.ipv4_mapped or (ipaddress.IPv4Address(int(read) & 0xFFFF_FFFF) if read in _NAT64 else None)
        if inner is not None:
            return is_public(str(inner))
    if any(read in network for network in _CLOSED if network.version == read.version):
        return False
    return read.is_global and not read.is_multicast and not read.is_reserved


def _read_host(text: str) -> tuple[str, str, int]:
    """Scheme, name and port of an entry of the list; InputError where it is not exactly one host."""
    scheme, separator, rest = text.strip().lower().partition("://")
    if not separator:
        scheme, rest = "https", scheme
    name, colon, digits = rest.partition(":")
    port = PORTS.get(scheme, 0) if not colon else int(digits) if digits.isascii() and digits.isdigit() else 0
    if scheme not in PORTS or not 1 <= port <= 65_535 or not _HOST.fullmatch(name):
        raise InputError(f"host {text[:200]!r} is unusable; give one exact name such as images.example.org, without wildcards")
    if _NUMBER.fullmatch(name.rpartition(".")[2]):
        raise InputError(f"host {text[:200]!r} is an address in numbers; give the name of a public host")
    return scheme, name, port


def _path_of(parts: SplitResult) -> str:
    return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


def _check_answer(target: Target, status: int, headers: dict[str, str], most: int) -> None:
    if status != 200:
        raise InputError(f"{target.host} answered with status {status}; check the address of the picture")
    if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
        raise InputError(f"{target.host} sent the picture packed although it was asked not to; send the picture itself")
    length = headers.get("content-length", "0")
    if int(length) > most:  # h11 has seen that these are digits
        raise InputError(f"the picture at {target.host} has {length} bytes, more than {most}; send a smaller one")


async def _resolve(host: str, port: int) -> list[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def _connect(address: str, port: int, name: str | None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = ssl.create_default_context() if name is not None else None
    return await asyncio.open_connection(address, port, ssl=context, server_hostname=name, limit=65_536)
