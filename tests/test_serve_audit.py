"""The audit log where the disk fails, and its secret; who asks what, rotation and waiting: test_serve_safety.py."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from traceir.errors import StoreError
from traceir.items import Query
from traceir.serve.audit import AuditLog, read_secret


def written(path: Path) -> list[Any]:
    """Each line as JSON, or as text where it is none."""
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            found.append(line)
    return found


def test_rotation_that_fails_loses_counted_lines_and_neither_the_thread_nor_a_file(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    (tmp_path / "audit.jsonl.new").mkdir()
    audit = AuditLog(path, most_bytes=150, keep=2)
    for number in range(6):
        audit.write({"number": number})
    while audit._thread.is_alive() and audit.dropped + len(written(path)) < 6:
        audit._thread.join(0.01)
    lost, kept = audit.dropped, written(path)
    assert audit._thread.is_alive() and 0 < lost < 6 and [line["number"] for line in kept] == list(range(6 - lost))
    (tmp_path / "audit.jsonl.new").rmdir()
    audit.write({"number": 6})
    audit.close()
    assert written(tmp_path / "audit.jsonl.1") == kept
    assert [line.get("dropped", line.get("number")) for line in written(path)] == [lost, 6] and audit.dropped == lost


def test_line_that_cannot_be_told_is_counted_and_the_next_is_written(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.jsonl")
    for value in (object(), 1):
        audit.write({"number": value})
    audit.close()
    assert [line.get("dropped", line.get("number")) for line in written(tmp_path / "audit.jsonl")] == [1, 1]


def test_line_after_half_a_line_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, whole, full = tmp_path / "audit.jsonl", os.write, [True]
    path.write_text('{"left by a former pro')

    def write(handle: int, data: bytes) -> int:
        return whole(handle, data[:20] if b'"number":1' in data and full.pop() else data)

    monkeypatch.setattr("traceir.serve.audit.os.write", write)
    audit = AuditLog(path)
    for number in range(3):
        audit.write({"number": number})
    audit.close()
    former, first, half, told, last = written(path)
    assert former == '{"left by a former pro' and isinstance(half, str)
    assert (first["number"], told["dropped"], last["number"]) == (0, 1, 2)


def test_hash_of_a_content_needs_the_secret_of_the_log(tmp_path: Path) -> None:
    query = Query.of(text="invented wish")
    one, again, other = (AuditLog(tmp_path / name) for name in ("one.jsonl", "one.jsonl", "other.jsonl"))
    told = one.describe(query)["hmac"]
    assert told == again.describe(query)["hmac"] != other.describe(query)["hmac"]
    assert query.content_hash() not in str(one.describe(query))
    assert stat.S_IMODE((tmp_path / "one.jsonl.secret").stat().st_mode) == 0o600
    for audit in (one, again, other):
        audit.close()


@pytest.mark.parametrize(("text", "mode", "shown"), [("ab" * 32, 0o644, "others may read"), ("", 0o600, "hex digits")])
def test_secret_that_is_none_is_refused(tmp_path: Path, text: str, mode: int, shown: str) -> None:
    place = tmp_path / "audit.jsonl.secret"
    place.write_text(text)
    place.chmod(mode)
    with pytest.raises(StoreError, match=shown):
        read_secret(tmp_path / "audit.jsonl")
