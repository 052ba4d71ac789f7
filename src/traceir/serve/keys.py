"""API keys: made once, shown once, stored only as hashes in one JSON file that may change while the server runs.

A key is `tir_` and 32 random bytes: no slow, salted hash is needed. The file's format is in docs/formats.md.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import Final, Literal, cast

from traceir.errors import InputError, StoreError
from traceir.files import replacing
from traceir.serve.security import Refusal
from traceir.serve.tenants import check_tenant

log = logging.getLogger(__name__)
FORMAT: Final = 1
PREFIX: Final = "tir_"
Scope = Literal["read", "write"]
SCOPES: Final[tuple[Scope, ...]] = ("read", "write")
MAX_REQUESTS_PER_MINUTE: Final = 1_000_000
_KEY = re.compile(r"tir_[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
Clock = Callable[[], datetime]


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: the name of a key, what it may do, whose items it sees (None: those of no tenant), and its own limit of speed."""

    name: str
    scopes: tuple[Scope, ...]
    tenant: str | None = None
    requests_per_minute: int | None = None


ANYONE: Final = Principal("anyone", SCOPES)  # who asks where no keys are configured, which is on a loopback address only


@dataclass(frozen=True, slots=True, kw_only=True)
class Key(Principal):
    """What is kept of a key. `created` and `expires` are UTC in ISO 8601. InputError for an unusable value."""

    created: str
    expires: str | None
    sha256: str

    def __post_init__(self) -> None:
        rate, ordered = self.requests_per_minute, tuple(scope for scope in SCOPES if scope in self.scopes)
        if not ordered or len(ordered) != len(self.scopes):
            raise InputError(f"scopes {', '.join(map(repr, self.scopes)) or '(none)'} are unusable; give read, write, or both")
        object.__setattr__(self, "scopes", ordered)
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name):
            shown = repr(self.name)[:80]
            raise InputError(f"key name {shown} is unusable; give 1 to 64 letters, digits, dots, dashes, @ or underscores")
        if rate is not None and (type(rate) is not int or not 1 <= rate <= MAX_REQUESTS_PER_MINUTE):
            raise InputError(f"{rate} requests a minute cannot be; give 1 to {MAX_REQUESTS_PER_MINUTE}")
        if self.tenant is not None:
            check_tenant(self.tenant)
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256) or (
            self.expires and datetime.fromisoformat(self.expires).tzinfo is None
        ):
            raise InputError(f"the hash or the end of key {self.name!r} is unusable; revoke it, and make another")


def make_key(
    path: Path,
    name: str,
    *,
    scopes: Sequence[str] = ("read",),
    tenant: str | None = None,
    days: float | None = None,
    requests_per_minute: int | None = None,
    now: Clock = lambda: datetime.now(UTC),
) -> str:
    """Adds a key to the file, made with mode 0600 if it is not there, and returns it: the only time it can be read.

    `days`: how long it is valid (None: until revoked). InputError for an unusable name, one already there, scopes or limits.
    """
    if days is not None and not 0 < days <= 36_500:
        raise InputError(f"a key cannot be valid for {days:g} days; give more than 0 and at most 36500")
    secret, made = PREFIX + secrets.token_urlsafe(32), now().astimezone(UTC)
    ends = None if days is None else (made + timedelta(days=days)).isoformat(timespec="seconds")
    created = made.isoformat(timespec="seconds")
    wanted = cast("tuple[Scope, ...]", tuple(scopes))  # which Key checks
    key = Key(name, wanted, tenant, requests_per_minute, created=created, expires=ends, sha256=_hash(secret))
    with _locked(path):
        keys = list_keys(path) if path.exists() else []
        if any(other.name == name for other in keys):
            raise InputError(f"{path} has a key called {name!r} already; revoke it first, or give another name")
        _write(path, [*keys, key])
    return secret


def list_keys(path: Path) -> list[Key]:
    """The keys in the file, in the order they were made. Raises StoreError where it is missing, damaged or open to others."""
    try:
        with path.open("rb") as file:
            mode, raw = os.fstat(file.fileno()).st_mode, file.read()
    except OSError as error:
        raise StoreError(f"keys file {path} cannot be read: {error.strerror}; make it with `traceir keys add`") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(f"keys file {path} can be written by others (mode {mode & 0o777:o}); run chmod 600 on it")
    try:
        stored = json.loads(raw)
        if stored["format"] != FORMAT:
            raise StoreError(f"keys file {path} has format {stored['format']!r}, not {FORMAT}; use the version that made it")
        keys = [Key(**{field.name: entry[field.name] for field in fields(Key)}) for entry in stored["keys"]]
        if len({key.name for key in keys}) != len(keys):
            raise ValueError("a name occurs twice")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(f"keys file {path} is damaged ({error}); restore it, or make the keys anew") from error
    return keys


def revoke_key(path: Path, name: str) -> Key:
    """Removes a key from the file; a running server refuses it from its next request on. InputError where there is none."""
    with _locked(path):
        keys = {key.name: key for key in list_keys(path)}
        if name not in keys:
            raise InputError(f"{path} has no key called {name[:80]!r}; it has {', '.join(keys) or 'none'}")
        revoked = keys.pop(name)
        _write(path, list(keys.values()))
    return revoked


class KeyRing:
    """The keys of a file, read again whenever it changes; an unreadable one lets nobody in. Thread-safe."""

    def __init__(self, path: Path, now: Clock = lambda: datetime.now(UTC)) -> None:
        self._path, self._now, self._lock = path, now, Lock()
        self._seen = self._stamp()
        self._keys: list[Key] | None = list_keys(path)

    def check(self, header: str | None) -> Principal | Refusal:
        """Who an `Authorization` header belongs to. Every stored hash is compared in constant time, whichever fits."""
        if header is None:
            return _unknown("this server needs a key; send the header Authorization: Bearer tir_...", "missing_key")
        scheme, _, secret = header.strip().partition(" ")
        if scheme.lower() != "bearer" or not _KEY.fullmatch(secret := secret.strip()):
            return _unknown("the Authorization header is not of the form Bearer tir_... with 43 characters", "invalid_key")
        if (keys := self._current()) is None:
            return Refusal(503, "the server cannot read its keys; its log says why", "keys_unreadable")
        digest = _hash(secret)
        matching = [key for key in keys if hmac.compare_digest(key.sha256, digest)]
        if not matching:
            return _unknown("the key is unknown or was revoked; ask whoever runs this server for another", "invalid_key")
        key = matching[-1]
        if key.expires is not None and datetime.fromisoformat(key.expires) <= self._now():
            return _unknown(f"the key expired at {key.expires}; ask whoever runs this server for another", "expired_key")
        return key

    def _current(self) -> list[Key] | None:
        with self._lock:
            if (stamp := self._stamp()) != self._seen:
                self._seen = stamp
                try:
                    self._keys = list_keys(self._path)
                    log.info("keys read again: %d", len(self._keys))
                except StoreError as error:
                    self._keys = None
                    log.error("nobody is let in: %s", error)
            return self._keys

    def _stamp(self) -> tuple[int, ...] | None:
        """What changes when the file does: a rename brings a new inode, an edit in place another time or size."""
        try:
            status = self._path.stat()
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_mode


def _unknown(message: str, code: str) -> Refusal:
    return Refusal(401, message, code, (("www-authenticate", 'Bearer realm="traceir"'),))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, also among processes; the lock file stays beside the keys. StoreError where it cannot be written."""
    try:
        with os.fdopen(os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise StoreError(f"keys file {path} cannot be written: {error.strerror}; check its folder and rights") from error


def _write(path: Path, keys: Sequence[Key]) -> None:
    with replacing(path.resolve(), durable=True) as stream:
        os.fchmod(stream.fileno(), 0o600)
        json.dump({"format": FORMAT, "keys": [asdict(key) for key in keys]}, stream, indent=1)
        stream.write("\n")
