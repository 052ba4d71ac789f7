"""`--set key=value`: overrides any field of a configuration, a frozen dataclass, with a checked value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from traceir.errors import InputError
from traceir.suggest import did_you_mean

Config = TypeVar("Config")


def override(config: Config, settings: Sequence[str]) -> Config:
    """A frozen dataclass with `key=value` applied in order; `size.hidden` reaches into a field, `weights.TASK` into a table.

    Values are read as the field's type. InputError for an unknown key, which lists the known ones, and for a value of
    another type.
    """
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key.strip():
            raise InputError(f"--set {setting!r} is not of the form key=value; write for instance steps=500")
        config = _replaced(config, key.strip(), key.strip(), value.strip())
    return config


def known_keys(config: Any) -> list[str]:
    """The keys that `override` takes, nested ones in full."""
    found: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            found += [f"{field.name}.{key}" for key in known_keys(value)]
        else:
            found.append(f"{field.name}.NAME" if isinstance(value, dict) else field.name)
    return found


def _replaced(config: Any, path: str, key: str, text: str) -> Any:
    """`config`, a dataclass, with the field that `path` names replaced; `key` is the whole key, for messages."""
    name, _, rest = path.partition(".")
    kinds = get_type_hints(type(config))
    if name not in kinds:
        known = known_keys(config)
        raise InputError(f"--set {key}: {name!r} is unknown{did_you_mean(name, known)}; known are {', '.join(known)}")
    value = getattr(config, name)
    if is_dataclass(value):
        if not rest:
            raise InputError(f"--set {key}: it has parts; set one of {', '.join(f'{key}.{k}' for k in known_keys(value))}")
        return replace(config, **{name: _replaced(value, rest, key, text)})
    if isinstance(value, dict):
        if not rest:
            raise InputError(f"--set {key}: it is a table; set one entry at a time, as in {name}.NAME=2")
        return replace(config, **{name: {**value, rest: _parse(text, float, key)}})
    if rest:
        raise InputError(f"--set {key}: {name} has no parts; known are {', '.join(known_keys(config))}")
    return replace(config, **{name: _parse(text, kinds[name], key)})


def _parse(text: str, kind: Any, key: str, others: str = "") -> Any:
    if kind is str:
        return text
    if kind == Literal["auto"] | bool:
        return text.lower() if text.lower() == "auto" else _parse(text, bool, key, "auto, ")
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise InputError(f"--set {key}={text}: choose one of {', '.join(get_args(kind))}")
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"--set {key}={text}: write {others}true or false")
        return text.lower() == "true"
    if kind is int or kind is float:
        try:
            number = kind(text)
        except ValueError as error:
            wanted = "a whole number" if kind is int else "a number"
            raise InputError(f"--set {key}={text}: write {wanted}") from error
        if not math.isfinite(number):
            raise InputError(f"--set {key}={text}: write a finite number")
        return number
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind == tuple[int, ...]:
        return tuple(_parse(part.strip(), int, key) for part in text.split(",") if part.strip())
    raise InputError(f"--set {key}: a field of type {kind} cannot be set here; change the preset in train/presets.py")
