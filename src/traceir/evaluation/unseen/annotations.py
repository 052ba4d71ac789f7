"""Annotation files, checked against declared types: errors name the file, the place in it, the value and what it must be."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError

from traceir.errors import DataError

Checked = TypeVar("Checked")


def _as_text(value: str) -> str:
    if not value.strip():
        raise ValueError("it must be a text that is not blank")
    return value


def _as_id(value: object) -> str:
    name = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(name, str) or name.split() != [name] or set(name) & set("/\\\0") or set(name) == {"."}:
        raise ValueError("it must be an id: a word or an integer")
    return name


def _as_file(name: str) -> str:
    parts = PurePosixPath(name)
    if not name or parts.is_absolute() or ".." in parts.parts or "\\" in name or "\0" in name:
        raise ValueError("it is not a file below the folder of the set")
    return name


Text = Annotated[str, AfterValidator(_as_text)]
"""A text that is not blank, as published."""
Id = Annotated[str, BeforeValidator(_as_id)]
"""Published as a string or as an integer, without blanks and slashes, so that it can name a file."""
FileName = Annotated[str, AfterValidator(_as_file)]
"""The relative path of a file that cannot leave its folder."""
Count = Annotated[int, Field(strict=True, ge=0)]


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; docs/unseen.md lists the files of each set") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; check the path and rights") from error


def check(path: Path, content: Any, kind: type[Checked]) -> Checked:
    """The content of a file, JSON as bytes or what was read from it, of the type `kind`."""
    adapter = TypeAdapter(kind)
    try:
        return adapter.validate_json(content) if isinstance(content, bytes) else adapter.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    what = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        line = re.search(r"line (\d+)", what)
        raise DataError(f"{path}:{line[1] if line else 1}: {what}; download the file again")
    place = ""
    for step in first["loc"]:
        place += f" {step}" if isinstance(step, int) and place else f", {f'entry {step}' if isinstance(step, int) else step}"
    raise DataError(f"{path}{place}: is {repr(first['input'])[:120]}: {what}; download the file again")


def read_annotations(path: Path, kind: type[Checked]) -> Checked:
    """The content of a JSON file, of the type `kind`."""
    return check(path, read_bytes(path), kind)
