"""The first screen of the README, line by line, as a new user would: what it says is printed is printed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.readme import README, SAMPLE, printed_by, sample
from traceir.encoder import Encoder
from traceir.index import open_index
from traceir.items import Query
from traceir.retrieval.search import Searcher

NUMBER = re.compile(r"\d\.\d{3}\b")


@pytest.fixture(scope="module")
def screen() -> dict[str, list[str]]:
    """The fenced blocks of the README by language, in order."""
    blocks: dict[str, list[str]] = {}
    for language, body in re.findall(r"^```(\w+)\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        blocks.setdefault(language, []).append(body)
    return blocks


@pytest.fixture(scope="module")
def first_hour(screen: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What each command of the first screen prints, run in order in an empty folder; those that install and serve are not run."""
    folder = tmp_path_factory.mktemp("first hour")
    with contextlib.chdir(folder):
        lines = [shlex.split(line, comments=True) for line in screen["sh"][1].splitlines()]
        ran = {}
        for program, *arguments in lines:
            if program == "traceir" and arguments[0] != "serve":
                words = [word for part in arguments for word in (map(str, sorted(Path().glob(part))) if "*" in part else [part])]
                ran[arguments[0]] = printed_by(words)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(screen["python"][0], "README.md", "exec"), {})
        ran["python"] = out.getvalue()
        yield ran


@pytest.mark.slow
def test_the_sample_is_what_the_demo_prints(first_hour: dict[str, str]) -> None:
    shown = SAMPLE.search(README.read_text(encoding="utf-8"))
    assert shown is not None, "`python -m benchmarks.readme` writes it"
    printed = sample(first_hour["demo"])
    assert NUMBER.sub("#", shown[2]) == NUMBER.sub("#", printed)
    for in_page, now in zip(NUMBER.findall(shown[2]), NUMBER.findall(printed), strict=True):
        assert float(now) == pytest.approx(float(in_page), abs=0.005)


def test_the_commands_for_real_images_end_offline_in_one_line(screen: dict[str, list[str]], tmp_path: Path) -> None:
    """Up to the download itself, which nothing here can answer: not the hub, and not an empty cache."""
    lines = [shlex.split(line, comments=True) for line in screen["sh"][0].splitlines()]
    [model] = [line[1].partition("=")[2] for line in lines if line[0] == "export"]
    (tmp_path / "Pictures").mkdir()
    Image.new("RGB", (40, 30), "teal").save(tmp_path / "Pictures" / "door.jpg")
    around = {**os.environ, "TRACEIR_MODEL": model, "HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for line in [line for line in lines if line[0] == "traceir" and line[1] == "index"]:
        words = [word.replace("~", str(tmp_path)) for word in line[1:]]
        command = [sys.executable, "-m", "traceir", *words]
        ran = subprocess.run(command, env=around, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert (ran.returncode, ran.stdout) == (2, "")
        [message] = ran.stderr.splitlines()
        assert model in message and "check the name and the connection" in message
    assert not (tmp_path / "photos.index").exists()


@pytest.mark.slow
def test_searches_of_the_first_screen_find_what_they_ask_for(screen: dict[str, list[str]], first_hour: dict[str, str]) -> None:
    """By the command, by Python, by the body of the curl line: a white, a blue, a purple ring (letters name colour and shape)."""
    first = next(line for line in first_hour["search"].splitlines() if line.startswith("  1  "))
    assert "scene_wobopo" in first and first_hour["python"] == screen["text"][1]
    assert len([line for line in screen["python"][0].splitlines() if line.strip() and "import" not in line]) <= 8
    line = next(block for block in screen["sh"] if block.startswith("curl"))
    asked, encoder = json.loads(shlex.split(line.replace("\\\n", " "))[-1]), Encoder.from_pretrained()
    with open_index(next(Path().glob("out/demo/index-*")), encoder) as index:
        result = Searcher(encoder, index).search(Query.of(text=asked["text"], target=asked["modality"]), k=asked["k"])
    assert "scene_wobopo" in str(result.hits[0].image)
