"""What a command answers before it imports what costs seconds: wrong names, places, ports and devices."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from fakes import FakeEncoder

from traceir.checkpoint import bundled_model, check_model, fetch, hub_answers
from traceir.errors import ModelError
from traceir.evaluation.results import QueryOutcome
from traceir.index import open_index
from traceir.items import Item

ROOT = Path(__file__).parents[1]


def test_wrong_arguments_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
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
from traceir.cli.main import main
for line in sys.stdin.read().splitlines():
    shown, code = io.StringIO(), 2
    with contextlib.redirect_stderr(shown), contextlib.suppress(SystemExit):
        code = main(line.split())
    print(line, code, "torch" in sys.modules, " ".join(shown.getvalue().split()), sep="\\t")
"""
    done = subprocess.run([sys.executable, "-c", script], input="\n".join(wrong), capture_output=True, text=True, check=True)
    answers = [line.split("\t") for line in done.stdout.splitlines()]
    assert [line for line, *_ in answers] == list(wrong)
    for line, code, torch, shown in answers:
        assert (code, torch) == ("2", "False") and wrong[line] in shown, (line, code, torch, shown)
    assert not (tmp_path / "index").exists(), "nothing was made"


def test_lists_reports_refusals_and_searches_for_words_import_only_what_they_need(tmp_path: Path) -> None:
    outcome = QueryOutcome("cirr_task7", "8:1", 1, "direct", 0, False, 0.5, 1, None, None, "")
    (tmp_path / "queries-auto.jsonl").write_text(json.dumps(asdict(outcome)) + "\n")
    row = {"queries": 1, "metric_k": 5, "queries_per_second": 1.0}
    results = {"format": 2, "model": "m", "data": "d", "split": "test", "limit": None, "routes": {"auto": {"cirr_task7": row}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    encoder = FakeEncoder()
    with open_index(tmp_path / "index", encoder, create=True) as index:
        index.upsert([Item.of(text="a red cup", id="cup")], np.ones((1, encoder.width), dtype=np.float32))
    words = f"search cup --mode keyword --index {tmp_path}/index"
    unneeded = {
        "models": ("numpy", "PIL", "traceir.serve.keys"),
        f"report routes {tmp_path}": ("torch", "scipy"),
        "keys list --file /nothere": ("jinja2", "traceir.lab"),
        "search --text x --index /nothere": ("jinja2", "traceir.lab", "torch"),
        words: ("torch", "faiss", "jinja2"),
    }
    script = """
import os, sys
from traceir.cli.main import main
for line in sys.stdin.read().splitlines():
    if not os.fork():
        main(line.split())
        print(line, *sys.modules, sep="\\t", flush=True)
        os._exit(0)
    os.wait()
    import traceir.index  # after the list of models: all others need it
"""
    done = subprocess.run([sys.executable, "-c", script], input="\n".join(unneeded), capture_output=True, text=True, check=True)
    loaded = {line: set(names) for line, *names in (shown.split("\t") for shown in done.stdout.splitlines()) if names}
    for line, names in unneeded.items():
        assert loaded[line].isdisjoint(names), line
    assert "cup  a red cup" in done.stdout


def test_a_name_that_can_be_no_checkpoint_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("./nothere", "nothere", "/no/where", "models/nothere", "a/b/c", "../x/y", "owner/na me", ""):
        with pytest.raises(ModelError, match=r"no folder|holds no config"):
            check_model(name)
    check_model("Qwen/Qwen2.5-VL-3B-Instruct")


def test_an_unreachable_hub_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound and not listening: refused at once
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{taken.getsockname()[1]}")
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_HUB_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        assert not hub_answers()
        tries: list[object] = []
        connect = socket.create_connection
        monkeypatch.setattr(socket, "create_connection", lambda *arguments: tries.append(arguments) or connect(*arguments))
        with pytest.raises(ModelError, match=r"Qwen/Nothere.*local cache.*does not answer"):
            fetch("Qwen/Nothere")
        assert len(tries) == 1
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert not hub_answers() and len(tries) == 1


def test_the_wheel_has_the_model_and_the_pages(tmp_path: Path) -> None:
    """What `pip install` of the wheel brings is all that `traceir demo` and `traceir serve` need."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    script = "from setuptools import build_meta; print(build_meta.build_wheel('wheel'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    with zipfile.ZipFile(tmp_path / "wheel" / done.stdout.splitlines()[-1]) as wheel:
        packed = {name: wheel.getinfo(name).file_size for name in wheel.namelist()}
    kept = [path for path in (ROOT / "src").rglob("*") if path.is_file() and not {"__pycache__"} & set(path.parts)]
    wanted = {path.relative_to(ROOT / "src").as_posix(): path for path in kept if "egg-info" not in str(path)}
    assert {name for name in wanted if name not in packed} == set()
    assert packed["traceir/models/mini/model.safetensors"] == (bundled_model() / "model.safetensors").stat().st_size > 10**6
