"""The audit log: who asked what, also where the disk fails or hangs."""

from __future__ import annotations

import hmac
import json
import resource
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from test_serve_safety import Message, Receive, Send, bearer, echo, encoded, post

from traceir.errors import StoreError
from traceir.images import ImageInput
from traceir.items import Query
from traceir.serve.access import KeyMiddleware, Limits
from traceir.serve.audit import AuditLog, read_secret
from traceir.serve.keys import KeyRing, make_key
from traceir.serve.security import AccessRules, SecurityMiddleware


def written(path: Path) -> list[Any]:
    """What each line holds: its number, how many it says were dropped, or the text of a line that was cut."""
    found: list[Any] = []
    for line in path.read_text().splitlines():
        told = json.loads(line) if line.endswith("}") else {"number": line}
        found.append(told.get("number", {"dropped": told.get("dropped")}))
    return found


def test_gate_writes_who_asked_what(tmp_path: Path) -> None:
    query = Query.of(text="a secret wish\n", image=ImageInput.from_bytes(encoded()), instruction="Find it")
    key = make_key(tmp_path / "keys.json", "reader", tenant="acme")

    async def handler(scope: Message, receive: Receive, send: Send) -> None:
        scope["state"]["audit"].add(query)
        await echo(scope, receive, send)

    for contents in (False, True):
        path = tmp_path / f"audit-{contents}.jsonl"
        audit = AuditLog(path, contents=contents)
        app = SecurityMiddleware(KeyMiddleware(handler, KeyRing(tmp_path / "keys.json"), Limits(), audit), AccessRules())
        _, headers, _ = post(app, bearer(key))
        post(app)
        audit.close()
        first, second = map(json.loads, path.read_text().splitlines())
        assert first["request"] == headers["x-request-id"] and first["path"] == "/search"
        assert (first["key"], first["tenant"], first["status"]) == ("reader", "acme", 200)
        secret = bytes.fromhex((tmp_path / f"{path.name}.secret").read_text())  # as an operator finds a content
        assert first["asked"][0]["hmac"] == hmac.new(secret, query.content_hash().encode(), "sha256").hexdigest()
        assert ("secret wish" in path.read_text()) == contents and key not in path.read_text()
        assert (second["key"], second["status"]) == (None, 401) and "asked" not in second
        assert {stat.S_IMODE(one.stat().st_mode) for one in (path, tmp_path / f"{path.name}.secret")} == {0o600}


def test_log_rotates_keeps_the_newest_and_counts_what_a_failed_rotation_loses(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    audit = AuditLog(path, most_bytes=400, keep=2)
    for number in range(40):
        audit.write({"number": number})
    audit.close()
    names = sorted(one.name for one in tmp_path.iterdir() if one.suffix != ".secret")
    kept = [number for name in reversed(names) for number in written(tmp_path / name)]
    assert names == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"] and kept == list(range(40 - len(kept), 40))
    assert all(one.stat().st_size <= 400 for one in tmp_path.iterdir())
    for name in names:
        (tmp_path / name).unlink()
    (tmp_path / "audit.jsonl.1" / "in the way").mkdir(parents=True)
    audit = AuditLog(path, most_bytes=400, keep=1)
    for number in range(12):
        audit.write({"number": number})
    audit.write({"number": object()})  # that cannot be told
    while audit.dropped + len(written(path)) < 13:
        time.sleep(0.01)
    lost = audit.dropped
    assert 1 < lost < 12 and written(path) == list(range(13 - lost))
    (tmp_path / "audit.jsonl.1" / "in the way").rmdir()
    (tmp_path / "audit.jsonl.1").rmdir()
    audit.write({"number": 13})
    audit.close()
    assert written(tmp_path / "audit.jsonl.1") == list(range(13 - lost)) and written(path) == [{"dropped": lost}, 13]


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file of this process grows beyond so many bytes meanwhile."""
    before, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)


def test_line_that_a_full_disk_cut_stays_and_the_next_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    path.write_text('{"left by a former pro')
    audit = AuditLog(path)
    audit.write({"number": 0})
    while len(path.read_text().splitlines()) < 2:
        time.sleep(0.01)
    with full_disk(path.stat().st_size + 20):
        audit.write({"number": 1})
        while not audit.dropped:
            time.sleep(0.01)
    audit.write({"number": 2})
    audit.close()
    former, first, half, told, last = written(path)
    assert former == '{"left by a former pro' and len(half) == 20
    assert (first, told, last, audit.dropped) == (0, {"dropped": 1}, 2, 1)


def test_log_never_waits_and_tells_what_it_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, whole = threading.Event(), json.dumps
    monkeypatch.setattr("traceir.serve.audit.json.dumps", lambda *given, **options: (stuck.wait(10), whole(*given, **options))[1])
    audit = AuditLog(tmp_path / "audit.jsonl", waiting=2)
    for number in range(10):
        audit.write({"number": number})  # returns although the disk hangs
    lost = audit.dropped
    audit.close(0.01)  # gives up
    stuck.set()
    audit.close()
    told = written(tmp_path / "audit.jsonl")
    numbers = [one for one in told if isinstance(one, int)]
    assert lost >= 7 and len(numbers) + lost == 10 and sum(one["dropped"] for one in told if isinstance(one, dict)) == lost


@pytest.mark.parametrize(("text", "mode", "shown"), [("ab" * 32, 0o644, "others may read"), ("", 0o600, "hex digits")])
def test_secret_that_is_none_is_refused(tmp_path: Path, text: str, mode: int, shown: str) -> None:
    secret = tmp_path / "audit.jsonl.secret"
    secret.write_text(text)
    secret.chmod(mode)
    with pytest.raises(StoreError, match=shown):
        read_secret(tmp_path / "audit.jsonl")
