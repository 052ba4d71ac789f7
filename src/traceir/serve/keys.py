"""API keys: made once, shown once, stored only as hashes in one JSON file that may change while the server runs.

A key is `tir_` and 32 random bytes, so its SHA-256 can neither be guessed nor looked up in a table: a slow, salted password hash
protects words that people choose, costs time on every request, and would add nothing here. The file's format is in
docs/formats.md.
"""

from __future__ import annotations

import base64
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
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import Any, Final, Literal, cast

from traceir.errors import InputError, StoreError
from traceir.serve.tenants import check_tenant

log = logging.getLogger(__name__)
FORMAT: Final = 1
PREFIX: Final = "tir_"
Scope = Literal["read", "write"]
SCOPES: Final[tuple[Scope, ...]] = ("read", "write")
MAX_REQUESTS_PER_MINUTE: Final = 1_000_000
_SECRET_BYTES: Final = 32
_KEY = re.compile(r"tir_[A-Za-z0-9_-]{43}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
Clock = Callable[[], datetime]


@dataclass(frozen=True, slots=True)
class Key:
    """What is kept of a key. `created` and `expires` are UTC in ISO 8601; without `tenant` it sees what belongs to no tenant."""

    name: str
    scopes: tuple[Scope, ...]
    tenant: str | None
    created: str
    expires: str | None
    requests_per_minute: int | None
    sha256: str


@dataclass(frozen=True, slots=True)
class Principal:
    """Who asks: the name of a key, what it may do, whose items it sees, and its own limit of speed if it has one."""

    name: str
    scopes: tuple[Scope, ...]
    tenant: str | None = None
    requests_per_minute: int | None = None

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes


ANYONE: Final = Principal("anyone", SCOPES)
"""Who asks where no keys are configured, which is on a loopback address only."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request may not go on: the HTTP status, a message for people, a code for programs."""

    status: int
    message: str
    code: str


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
    wanted = tuple(scope for scope in SCOPES if scope in scopes)
    if not wanted or len(wanted) != len(scopes):
        raise InputError(f"scopes {', '.join(map(repr, scopes)) or '(none)'} are unusable; give read, write, or both")
    if not _NAME.fullmatch(name):
        raise InputError(f"key name {name[:80]!r} is unusable; give 1 to 64 letters, digits, dots, dashes, @ or underscores")
    if days is not None and not 0 < days <= 36_500:
        raise InputError(f"a key cannot be valid for {days:g} days; give more than 0 and at most 36500")
    if requests_per_minute is not None and not 1 <= requests_per_minute <= MAX_REQUESTS_PER_MINUTE:
        raise InputError(f"{requests_per_minute} requests a minute cannot be; give 1 to {MAX_REQUESTS_PER_MINUTE}")
    secret = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(_SECRET_BYTES)).decode().rstrip("=")
    made = now()
    expires = None if days is None else _as_text(made + timedelta(days=days))
    tenant = None if tenant is None else check_tenant(tenant)
    key = Key(name, wanted, tenant, _as_text(made), expires, requests_per_minute, _hash(secret))
    with _locked(path):
        keys = list_keys(path) if path.exists() else []
        if any(one.name == name for one in keys):
            raise InputError(f"{path} has a key called {name!r} already; revoke it first, or give another name")
        _write(path, [*keys, key])
    return secret


def list_keys(path: Path) -> list[Key]:
    """The keys in the file, in the order they were made. Raises StoreError where it is missing, damaged or open to others."""
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            raw = file.read()
    except OSError as error:
        raise StoreError(f"keys file {path} cannot be read: {error.strerror}; make it with `traceir keys add`") from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(f"keys file {path} can be written by others (mode {mode & 0o777:o}); run chmod 600 on it")
    try:
        told = json.loads(raw)
        if told["format"] != FORMAT:
            raise StoreError(f"keys file {path} has format {told['format']!r}, not {FORMAT}; use the version that made it")
        keys = [_key_of(one) for one in told["keys"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise StoreError(f"keys file {path} is damaged ({error}); restore it, or make the keys anew") from error
    if len({key.name for key in keys}) != len(keys):
        raise StoreError(f"keys file {path} is damaged: a name occurs twice; remove one of them")
    return keys


def revoke_key(path: Path, name: str) -> Key:
    """Removes a key from the file; a running server refuses it from its next request on. InputError where there is none."""
    with _locked(path):
        keys = list_keys(path)
        found = [key for key in keys if key.name == name]
        if not found:
            raise InputError(f"{path} has no key called {name[:80]!r}; it has {', '.join(key.name for key in keys) or 'none'}")
        _write(path, [key for key in keys if key.name != name])
    return found[0]


class KeyRing:
    """The keys of a file, read again whenever it changes. Thread-safe.

    A file that has become unreadable lets nobody in: revoking must not be undone by damage.
    """

    def __init__(self, path: Path, now: Clock = lambda: datetime.now(UTC)) -> None:
        self._path, self._now = path, now
        self._lock = Lock()
        self._seen = self._stamp()
        self._keys: list[Key] | None = list_keys(path)

    def check(self, header: str | None) -> Principal | Refusal:
        """Who an `Authorization` header belongs to. Every stored hash is compared in constant time, whichever fits."""
        if header is None:
            return Refusal(401, "this server needs a key; send the header Authorization: Bearer tir_...", "missing_key")
        scheme, _, secret = header.strip().partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not _KEY.fullmatch(secret):
            return Refusal(401, "the Authorization header is not of the form Bearer tir_... with 43 characters", "invalid_key")
        keys = self._current()
        if keys is None:
            return Refusal(503, "the server cannot read its keys; its log says why", "keys_unreadable")
        digest, found = _hash(secret), None
        for key in keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        if found is None:
            return Refusal(401, "the key is unknown or was revoked; ask whoever runs this server for another", "invalid_key")
        if found.expires is not None and datetime.fromisoformat(found.expires) <= self._now():
            return Refusal(401, f"the key expired at {found.expires}; ask whoever runs this server for another", "expired_key")
        return Principal(found.name, found.scopes, found.tenant, found.requests_per_minute)

    def _current(self) -> list[Key] | None:
        with self._lock:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                try:
                    self._keys = list_keys(self._path)
                    log.info("keys read again: %d", len(self._keys))
                except StoreError as error:
                    self._keys = None
                    log.error("nobody is let in: %s", error)
            return self._keys

    def _stamp(self) -> tuple[int, int, int, int, int] | None:
        """What changes when the file does: a rename brings a new inode, an edit in place another time or size."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_mode


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _as_text(when: datetime) -> str:
    return when.astimezone(UTC).isoformat(timespec="seconds")


def _key_of(told: dict[str, Any]) -> Key:
    """One entry of the file, every field checked; ValueError, TypeError or KeyError where one is wrong."""
    key = Key(**{one.name: told[one.name] for one in fields(Key)})
    texts = (key.name, key.created, key.sha256, *(one for one in (key.tenant, key.expires) if one is not None))
    if not all(isinstance(text, str) for text in texts) or not isinstance(key.scopes, list):
        raise TypeError("a field has the wrong type")
    if not _NAME.fullmatch(key.name) or not _SHA256.fullmatch(key.sha256) or not set(key.scopes) <= set(SCOPES):
        raise ValueError(f"the key {key.name[:80]!r} has an unusable name, hash or scope")
    if key.tenant is not None:
        check_tenant(key.tenant)
    if key.expires is not None and datetime.fromisoformat(key.expires).tzinfo is None:
        raise ValueError(f"the key {key.name!r} expires at a time without a zone")
    if key.requests_per_minute is not None and (type(key.requests_per_minute) is not int or key.requests_per_minute < 1):
        raise ValueError(f"the key {key.name!r} has {key.requests_per_minute!r} requests a minute")
    return replace(key, scopes=cast("tuple[Scope, ...]", tuple(key.scopes)))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, also among processes; the lock file stays beside the keys."""
    try:
        handle = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"keys file {path} cannot be written: {error.strerror}; check its folder and rights") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(path: Path, keys: Sequence[Key]) -> None:
    """The whole file, written beside its place with mode 0600, synced, and renamed."""
    target = path.resolve()
    fresh = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    text = json.dumps({"format": FORMAT, "keys": [asdict(key) for key in keys]}, indent=1) + "\n"
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, target)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise StoreError(f"keys file {path} cannot be written: {error.strerror}; check its folder and rights") from error
