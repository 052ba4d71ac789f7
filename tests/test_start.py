"""What a command answers before it imports what costs seconds: wrong names, places, ports and devices."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from traceir import checkpoint
from traceir.checkpoint import check_model, fetch, hub_answers
from traceir.errors import ModelError


def test_field_report_02_wrong_arguments_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b\n")
    (tmp_path / "note.txt").write_text("a red cube")
    index, note = f"--index {tmp_path}/index", f"{tmp_path}/note.txt"
    wrong = {
        f"index add {tmp_path}/nothere {index}": "nothere does not exist",
        f"index add {tmp_path}/table.csv {index}": "table.csv",
        f"index add {note} {index} --device gpu": "--device 'gpu'",
        f"index add {note} {index} --device cuda:x": "--device 'cuda:x'",
        f"index add {note} {index} --model ./nothere": "no folder './nothere'",
        f"index add {note} {index} --model nothere": "no folder 'nothere'",
        f"index add {note} {index} --model {tmp_path}/empty": "holds no config.json",
        f"index add {note} {index} --model {note}": "is a file",
        f"search --text x --index {tmp_path}/nothere": "nothere",
        f"search --text x {index} --model ./nothere": "no folder './nothere'",
        f"search --text x {index} --device gpu": "--device 'gpu'",
        f"explain --text x --model {tmp_path}/nothere": "no folder",
        "explain --text x --device gpu": "--device 'gpu'",
        f"explain --image {tmp_path}/nothere.png": "nothere.png does not exist",
        f"serve {index} --port 99999": "port 99999",
        f"serve {index} --host 0.0.0.0": "there are no keys",
        f"serve {index} --device gpu": "--device 'gpu'",
        f"serve {index} --model ./nothere": "no folder './nothere'",
        f"serve {index} --keys {tmp_path}/nothere": "nothere",
        f"evaluate --data {tmp_path}/nothere --out {tmp_path}/out": "nothere",
        f"evaluate --data {tmp_path}/empty --out {tmp_path}/out --model ./nothere": "no folder './nothere'",
        f"unseen --data {tmp_path}/nothere --out {tmp_path}/out": "nothere",
        f"faithfulness --data {tmp_path}/nothere --out {tmp_path}/out": "nothere",
        f"merge {tmp_path}/nothere --out {tmp_path}/out": "nothere",
    }
    script = """
import contextlib, io, sys
from traceir.cli import main
for line in sys.stdin.read().splitlines():
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.suppress(SystemExit):
        code = 2
        code = main(line.split())
    print(line, code, "torch" in sys.modules, " ".join(told.getvalue().split()), sep="\\t")
"""
    done = subprocess.run([sys.executable, "-c", script], input="\n".join(wrong), capture_output=True, text=True, check=True)
    answers = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line for line, *_ in answers] == list(wrong)
    for line, code, torch, told in answers:
        assert (code, torch) == ("2", "False") and wrong[line] in told, (line, code, torch, told)
    assert not (tmp_path / "index").exists(), "nothing was made"


def test_field_report_25_a_name_that_can_be_no_checkpoint_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("./nothere", "nothere", "/no/where", "models/nothere", "a/b/c", "../x/y", "owner/na me", ""):
        with pytest.raises(ModelError, match=r"no folder|holds no config"):
            check_model(name)
    check_model("Qwen/Qwen2.5-VL-3B-Instruct")


def test_field_report_25_an_unreachable_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: refused at once
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        assert not hub_answers()
        tries: list[object] = []
        monkeypatch.setattr(checkpoint.socket, "create_connection", lambda *given: tries.append(given) or _refuse())
        with pytest.raises(ModelError, match=r"Qwen/Nothere.*local cache.*does not answer"):
            fetch("Qwen/Nothere")
        assert len(tries) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_answers() and len(tries) == 1


def _refuse() -> None:
    raise ConnectionRefusedError("refused")
