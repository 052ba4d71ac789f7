"""The audit log: who asked what, also where the disk fails or hangs."""

from __future__ import annotations

import hmac
import json
import resource
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
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


def logging(path: Path, numbers: Iterable[object], **options: Any) -> AuditLog:
    """A log with a line for each of these."""
    audit = AuditLog(path, **options)
    for number in numbers:
        audit.write({"number": number})
    return audit


def written(path: Path) -> list[Any]:
    """What each line holds: its number, how many it says were dropped, or the text of a line that was cut."""
    lines = [json.loads(line) if line.endswith("}") else {"number": line} for line in path.read_text().splitlines()]
    return [line.get("number", {"dropped": line.get("dropped")}) for line in lines]


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.01)


def test_a_line_says_who_asked_what(tmp_path: Path) -> None:
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
        assert {stat.S_IMODE(file.stat().st_mode) for file in (path, tmp_path / f"{path.name}.secret")} == {0o600}


def test_log_rotates_keeps_the_newest_and_counts_what_a_failed_rotation_loses(tmp_path: Path) -> None:
    path, rotated = tmp_path / "audit.jsonl", tmp_path / "audit.jsonl.1"
    logging(path, range(40), most_bytes=400, keep=2).close()
    files = sorted(file for file in tmp_path.iterdir() if file.suffix != ".secret")
    kept = [number for file in reversed(files) for number in written(file)]
    assert [file.name for file in files] == ["audit.jsonl", "audit.jsonl.1", "audit.jsonl.2"]
    assert kept == list(range(40 - len(kept), 40)) and all(file.stat().st_size <= 400 for file in files)
    for file in files:
        file.unlink()
    (rotated / "in the way").mkdir(parents=True)
    audit = logging(path, [*range(12), object()], most_bytes=400, keep=1)  # the last cannot be told
    until(lambda: audit.dropped + len(written(path)) == 13)
    lost = audit.dropped
    assert 1 < lost < 12 and written(path) == list(range(13 - lost))
    (rotated / "in the way").rmdir()
    rotated.rmdir()
    audit.write({"number": 13})
    audit.close()
    assert written(rotated) == list(range(13 - lost)) and written(path) == [{"dropped": lost}, 13]


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
    audit = logging(path, [0])
    until(lambda: len(written(path)) == 2)
    with full_disk(path.stat().st_size + 20):
        audit.write({"number": 1})
        until(lambda: audit.dropped == 1)
    audit.write({"number": 2})
    audit.close()
    former, first, half, *rest = written(path)
    assert former == '{"left by a former pro' and first == 0 and len(half) == 20
    assert rest == [{"dropped": 1}, 2] and audit.dropped == 1


def test_log_never_waits_and_tells_what_it_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stuck, whole = threading.Event(), json.dumps
    monkeypatch.setattr("traceir.serve.audit.json.dumps", lambda *args, **options: (stuck.wait(10), whole(*args, **options))[1])
    audit = logging(tmp_path / "audit.jsonl", range(10), waiting=2)  # returns although the disk hangs
    lost = audit.dropped
    audit.close(0.01)  # gives up
    stuck.set()
    audit.close()
    lines = written(tmp_path / "audit.jsonl")
    drops = [line["dropped"] for line in lines if isinstance(line, dict)]
    assert lost >= 7 and len(lines) - len(drops) + lost == 10 and sum(drops) == lost


@pytest.mark.parametrize(("text", "mode", "shown"), [("ab" * 32, 0o644, "others may read"), ("", 0o600, "hex digits")])
def test_secret_that_is_none_is_refused(tmp_path: Path, text: str, mode: int, shown: str) -> None:
    secret = tmp_path / "audit.jsonl.secret"
    secret.write_text(text)
    secret.chmod(mode)
    with pytest.raises(StoreError, match=shown):
        read_secret(tmp_path / "audit.jsonl")
