"""The documents against the code: links resolve, commands parse, Python examples name what exists, the reading list holds."""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from traceir.cli.main import build_parser

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "traceir"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?: {4,}|\t).*$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_VERB = re.compile(r"\btraceir((?: +[a-z][a-z-]*)+)")

page = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
parser_of_commands = functools.cache(build_parser)


def choices(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The verbs of a parser; {} where it has none."""
    parsers: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers.update(action.choices)
    return parsers


def named_verbs(text: str) -> Iterator[list[str]]:
    """The words after `traceir` in inline code."""
    for span in re.findall(r"`([^`\n]+)`", _FENCED.sub("", text)):
        if match := _VERB.match(span):
            yield match[1].split()


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `traceir` command line in a fenced shell block or an indented block."""
    shell = "\n".join(body for language, body in _FENCED.findall(text) if language in ("", "sh"))
    indented = "\n".join(_INDENTED.findall(_FENCED.sub("", text)))
    for line in f"{shell}\n{indented}".replace("\\\n", " ").splitlines():
        if line.strip().startswith("traceir "):
            yield shlex.split(line, comments=True)[1:]


def defines(module: str, name: str) -> bool:
    """A package is imported; a file is read, since some import packages of others that take seconds."""
    file = SOURCE.joinpath(*module.split(".")[1:]).with_suffix(".py")
    if module == "traceir" or not file.exists():
        return hasattr(importlib.import_module(module), name)
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return name in {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def missing_verbs(words: list[str]) -> list[str]:
    """The words, up to the first one that is no verb; [] where all verbs exist."""
    parser = parser_of_commands()
    for number, word in enumerate(words, start=1):
        known = choices(parser)
        if not known:
            return []
        if word not in known:
            return words[:number]
        parser = known[word]
    return []


@page
def test_relative_links_resolve(path: Path) -> None:
    targets = [target.partition("#")[0] for target in _LINK.findall(path.read_text(encoding="utf-8"))]
    relative = [target for target in targets if target and not re.match(r"[a-z]+:", target)]
    broken = [target for target in relative if not (path.parent / target).exists()]
    assert not broken, f"{path.name} links to {broken}, which do not exist"


@page
def test_named_verbs_exist(path: Path) -> None:
    wrong = [missing for words in named_verbs(path.read_text(encoding="utf-8")) if (missing := missing_verbs(words))]
    assert not wrong, f"{path.name} names {wrong}, which the command line does not have"


@page
def test_commands_parse(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(path.read_text(encoding="utf-8")):
        try:
            parser_of_commands().parse_args(arguments)
            refused = False
        except SystemExit:
            refused = True
        assert not refused, f"{path.name}: traceir {shlex.join(arguments)}\n{capsys.readouterr().err}"


@page
def test_python_examples_import_what_exists(path: Path) -> None:
    for language, body in _FENCED.findall(path.read_text(encoding="utf-8")):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(body)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "traceir":
                absent = [alias.name for alias in node.names if not defines(node.module, alias.name)]
                assert not absent, f"{path.name}: {node.module} has no {absent}"


def test_the_readers_above_find_something() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(_LINK.findall(readme)) >= 5 and list(commands(readme))
    assert list(named_verbs((ROOT / "docs" / "engineers.md").read_text(encoding="utf-8")))
    assert list(commands("    traceir search --index a\n")) == [["search", "--index", "a"]]
    assert defines("traceir.integrations.langchain", "TraceRetriever") and not defines("traceir.integrations.langchain", "Trace")
    assert missing_verbs(["index", "ad"]) == ["index", "ad"] and not missing_verbs(["index", "add", "photos"])


def test_the_reading_list_is_there_and_takes_an_hour() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| \d+ \| `([\w/]+\.py)` \|", text, re.MULTILINE)
    assert len(names) == 8 and sum(len((SOURCE / name).read_bytes().splitlines()) for name in names) <= 1800


def test_the_files_and_folders_that_the_architecture_names_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    packages = {path.name for path in SOURCE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert set(re.findall(r"^\| .*?`(\w+)/`", text, re.MULTILINE)) == packages
