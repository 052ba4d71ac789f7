"""The documents do what they say: every command and every Python example on a page is run, in order, in a folder of its own.

What cannot be run here stands in NOT_RUN with its reason; what takes long as it stands gets the options of SHORTER. A command
that neither runs nor is listed fails, so that a new one is either run or has a reason.
"""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import webbrowser
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from traceir.checkpoint import bundled_model
from traceir.cli.main import main

ROOT = Path(__file__).parents[1]
PAGES = {path.name: path for path in (*sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md")}
"""README.md shows what `make demo` prints, and has a test of its own."""

NOT_RUN = {
    r"^(source \.venv|make |python -m venv|pip install|SGLANG_|FINGERPRINT=)": "sets up an environment",
    r"^traceir index add photos --index photos\.index --model Qwen/|^traceir search .* --model Qwen/": "a model of 15 GB",
    r"--model (sentence-|st:google/|Qwen/Qwen3)|^python -m benchmarks\.library": "tests/test_library.py has such models",
    r"^traceir (index copy|serve --index) .*milvus\.example\.org": "a Milvus server",
    r"SGLangEncoder|^python -m benchmarks\.engine_parity": "an SGLang server; tests/test_engines.py has a stand-in",
    r"^traceir minibeir build --scale small --out data/minibeir-small$": "belongs to the SGLang server's commands",
    r"--profile (lamra|own\.json)|--model Alibaba-NLP/": "weights of other projects; tests/test_profiles.py has their shapes",
    r"^traceir minibeir build .*--scale full": "minutes of drawing",
    r"^traceir minibeir build --(out data/small$|out OUT --scale small|scale small --out out/look)": "12 s; tests/conftest.py",
    r"^traceir minibeir (sheet|unseen)": "seconds of drawing; tests/test_minibeir_build.py, tests/test_minibeir_unseen.py",
    r"^runs/|^traceir (--threads 1 )?train --preset mini|^python -m benchmarks\.bundle": "hours of training",
    r"^traceir evaluate .*(out/runs/mini/checkpoint|out/models/7b)": "a model that hours of training make",
    r"^(torchrun|accelerate|CUDA_VISIBLE_DEVICES=0)|--preset qwen": "GPUs; tests/test_train.py has two processes",
    r"^traceir (merge|push) out/": "a trained adapter over a hub id; tests/test_adapter.py, tests/test_cli.py",
    r"^traceir mteb ": "data sets of the hub; tests/test_mteb.py has small ones",
    r"^traceir ablate .*--out": "hours of training; tests/test_ablate.py",
    r"--teacher https://api\.openai\.com": "a hosted teacher, for money",
}  # fmt: skip
"""Pattern of commands that are not run -> what they need."""

TINY = "--set steps=1 --set batch=8 --set threads=1 --set precheck=false --set mixed_precision=false"
SHORTER = {
    r"^traceir train --preset emoji": TINY,
    r"^traceir evaluate .*--dry-run": "--rows oven_task6 --limit 1",
    r"^traceir evaluate .*--pool both": "--pool local --rows mscoco_task0,fashioniq_task7,cirr_task7 --limit 4",
    r"^traceir faithfulness": "--rows cirr_task7 --limit 2",
    r"^traceir unseen": "--columns visdial",
    r"^traceir reasoning build .*--teacher http": "--tasks cirr_task7,mscoco_task0",
    r"^traceir reasoning teacher": "--stall 0.2",
}
"""Pattern of commands -> options that make them quick."""

PORTS = {"serve": 8080, "teacher": 8891, "review": 8890}
"""Verbs that go on until they are stopped, and where the pages say they listen."""
LANGUAGES = ("sh", "python")
_FENCE = re.compile(r"^```(\w*)$")
_LINE = re.compile(r"^ {4,}(?:[A-Z_]{2,}=|(?:traceir|python|pip|make|curl|torchrun|accelerate|export|source|runs/)\b)")
"""A command in an indented block, which has no language."""


@dataclass(frozen=True)
class Example:
    """A command, or a block of Python, and its line in the page."""

    line: int
    language: str
    text: str

    @property
    def reason(self) -> str | None:
        """Why it is not run."""
        return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, self.text)), None)


def examples(page: str) -> Iterator[Example]:
    """The examples of a page in order; lines of shell that end in a backslash are one with the next."""
    language, began, held = "", 0, ""
    for number, line in enumerate(page.splitlines(), start=1):
        fence = _FENCE.match(line)
        if fence is not None:
            if language == "python":
                yield Example(began, language, held)
            language, began, held = ("" if language else fence[1] or "text"), number + 1, ""
        elif language == "python":
            held += f"{line}\n"
        elif language == "sh" or (not language and (held or _LINE.match(line))):
            held, began = held + line.strip(), began if held else number
            if held.endswith("\\"):
                held = f"{held[:-1].rstrip()} "
                continue
            command = re.sub(r"\s+#\s.*$", "", held)
            if command and not command.startswith("#"):
                yield Example(began, "sh", command)
            held = ""


@dataclass
class Shell:
    """Runs examples in this process; what serves goes on in a thread until `close`."""

    monkeypatch: pytest.MonkeyPatch
    ports: dict[str, int] = field(default_factory=dict)
    servers: list[tuple[uvicorn.Server, threading.Thread]] = field(default_factory=list)

    def run(self, example: Example) -> None:
        text = example.text
        for verb, port in self.ports.items():
            text = text.replace(f"localhost:{PORTS[verb]}", f"127.0.0.1:{port}").replace(
                f"127.0.0.1:{PORTS[verb]}", f"127.0.0.1:{port}"
            )
        if example.language == "python":
            exec(compile(text, f"line {example.line}", "exec"), {"__name__": "__main__"})
            return
        added = next((options for pattern, options in SHORTER.items() if re.search(pattern, example.text)), "")
        words = shlex.split(f"{text} {added}")
        if words[0] == "traceir":
            self._traceir(words[1:])
        elif words[0] == "curl":
            self._curl(text)
        elif words[:2] == ["python", "-c"]:
            self.monkeypatch.setattr(sys, "argv", ["-c", *words[3:]])
            exec(compile(words[2], f"line {example.line}", "exec"), {"__name__": "__main__"})
        elif words[0] == "export":
            self.monkeypatch.setenv(*words[1].split("=", 1))
        else:
            pytest.fail(f"nothing here runs it, and NOT_RUN does not say why: {example.text}")

    def _traceir(self, arguments: list[str]) -> None:
        verb = next((word for word in arguments[:2] if word in PORTS), None)
        if verb is not None:
            self._serve(verb, arguments)
            return
        assert main(arguments) == 0, f"traceir {shlex.join(arguments)} ended in an error"

    def _curl(self, text: str) -> None:
        if shutil.which("curl") is None:
            return
        command = text.replace("curl ", "curl --fail-with-body ", 1)
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and "event: error" not in done.stdout, f"{text}\n{done.stdout[:1000]}{done.stderr[:1000]}"

    def _serve(self, verb: str, arguments: list[str]) -> None:
        """Starts it on a free port, and waits until it is ready."""
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = int(listener.getsockname()[1])
        before = len(self.servers)
        thread = threading.Thread(target=main, args=([*arguments, "--port", str(port)],), daemon=True)
        thread.start()
        path = {"serve": "/ready", "teacher": "/v1/models", "review": "/"}[verb]
        names = [name for option, name in itertools.pairwise(arguments) if option == "--allow-host"]
        asked = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers={"Host": names[0]} if names else {})
        for _ in range(600):
            try:
                with urllib.request.urlopen(asked, timeout=5):
                    break
            except OSError:
                assert thread.is_alive(), f"traceir {shlex.join(arguments)} ended"
                time.sleep(0.05)
        assert len(self.servers) == before + 1, f"traceir {shlex.join(arguments)} is not ready"
        self.ports[verb] = port

    def close(self) -> None:
        for server, _ in self.servers:
            server.should_exit = True
        for _, thread in self.servers:
            thread.join(20)
            assert not thread.is_alive(), "a server does not end"


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    made = Shell(monkeypatch)
    run, interval = uvicorn.Server.run, sys.getswitchinterval()

    def noted(self: uvicorn.Server, *arguments: Any, **options: Any) -> None:
        made.servers.append((self, threading.current_thread()))
        run(self, *arguments, **options)

    monkeypatch.setattr(uvicorn.Server, "run", noted)
    monkeypatch.setattr(webbrowser, "open", lambda *_: True)
    yield made
    made.close()
    sys.setswitchinterval(interval)


@pytest.fixture
def folder(tmp_path: Path, folder: Path, unseen_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the files that the pages name, and nothing else; the working directory."""
    images = sorted((folder / "mbeir_images" / "mscoco_images").rglob("*.jpg"))
    for number, name in enumerate(
        ("photos/first.jpg", "photos/cup.jpg", "photos/sub/third.jpg", "query.jpg", "shoe.png", "shoe-1.png", "shoe-2.png")
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(images[number], tmp_path / name)
    (tmp_path / "photos" / "sub" / "note.txt").write_text("A red ring left of a blue star.\n")
    (tmp_path / "notes.txt").write_text("A purple cube in the middle.\n")
    lines = [
        {"id": "one", "text": "A toy cube.", "image": "query.jpg", "year": 1999, "kind": "toy"},
        {"id": "two", "text": "Mug."},
    ]
    (tmp_path / "catalogue.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    links = {"out/demo/minibeir": folder, "some/checkpoint": bundled_model(), "data/unseen": unseen_folder,
             "out/look": folder, "M-BEIR": Path("data/small"), "cot": Path("out/cot")}  # fmt: skip
    for name, target in links.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    _make_trainable(folder, tmp_path / "data" / "small")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _make_trainable(folder: Path, target: Path) -> None:
    """The test split of a MiniBEIR as a train split: what `traceir minibeir build --out data/small` makes in 12 seconds."""
    for name in ("query/train", "cot/train", "cand_pool/global"):
        (target / name).mkdir(parents=True)
    for name in ("mbeir_images", "instructions", "lessons", "meta.json"):
        if (folder / name).exists():
            (target / name).symlink_to(folder / name)
    for part, suffix in (("query", ""), ("cot", "_cot")):
        for file in sorted((folder / part / "test").glob("*.jsonl")):
            dataset = file.name.split("_")[1]
            with (target / part / "train" / f"mbeir_{dataset}_train{suffix}.jsonl").open("a", encoding="utf-8") as stream:
                stream.write(file.read_text(encoding="utf-8"))
    pool: dict[str, str] = {}
    for file in sorted((folder / "cand_pool" / "local").glob("*_cand_pool.jsonl")):
        pool |= {json.loads(line)["did"]: line for line in file.read_text(encoding="utf-8").splitlines()}
    union = target / "cand_pool" / "global" / "mbeir_union_train_cand_pool.jsonl"
    union.write_text("".join(f"{line}\n" for line in pool.values()), encoding="utf-8")


def _examples_of(name: str) -> list[Example]:
    return list(examples(PAGES[name].read_text(encoding="utf-8")))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PAGES if any(example.reason is None for example in _examples_of(name))])
def test_the_examples_of_a_page_run(name: str, folder: Path, shell: Shell) -> None:
    for example in _examples_of(name):
        if example.reason is not None:
            continue
        try:
            shell.run(example)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{name}:{example.line}: {example.text.splitlines()[0]}: {error!r}") from error


def test_every_reason_belongs_to_an_example() -> None:
    texts = [example.text for name in PAGES for example in _examples_of(name)]
    for pattern in (*NOT_RUN, *SHORTER):
        assert any(re.search(pattern, text) for text in texts), f"no page has an example of {pattern}; remove it"


def test_the_reader_of_examples_finds_them() -> None:
    shell = "```sh\na \\\n  b  # why\n# no\n```\n\n    traceir x   # told\n    XY=1 python -m y\n"
    page = f'{shell}    {{"no": 1}}\n\n```python\nz = 1\n```\n'
    assert [(example.line, example.language, example.text) for example in examples(page)] == [
        (2, "sh", "a b"), (7, "sh", "traceir x"), (8, "sh", "XY=1 python -m y"), (12, "python", "z = 1\n"),
    ]  # fmt: skip
