"""`--set key=value`: overrides any field of a configuration, a frozen dataclass, with a checked value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, is_dataclass, replace
from types import UnionType
from typing import Any, Final, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from traceir.errors import InputError
from traceir.suggest import did_you_mean

Config = TypeVar("Config")
NUMBERS: Final = {int: "a whole number", float: "a number"}


def override(config: Config, settings: Sequence[str]) -> Config:
    """A frozen dataclass with `key=value` applied in order; `size.hidden` reaches into a field, `weights.TASK` into a table.

    Values are read as the field's type; a configuration with a `modern_setting` knows names of earlier releases. InputError for
    an unknown key, which lists the known ones, and for a value of another type.
    """
    for setting in settings:
        key, equals, value = (part.strip() for part in setting.partition("="))
        if not equals or not key:
            raise InputError(f"--set {setting!r} is not of the form key=value; write for instance steps=500")
        modern_setting = getattr(config, "modern_setting", None)
        key, value = modern_setting(key, value) if modern_setting else (key, value)
        config = _replaced(config, key, key, value)
    return config


def known_keys(config: Any) -> list[str]:
    """The keys that `override` takes, nested ones in full."""
    keys: list[str] = []
    for field in fields(config):
        value = getattr(config, field.name)
        nested = known_keys(value) if is_dataclass(value) else ["NAME"] if isinstance(value, dict) else []
        keys += [f"{field.name}.{key}" for key in nested] or [field.name]
    return keys


def check_choices(config: Any) -> None:
    """InputError where a field of a dataclass is none of the values that its type, a Literal, names."""
    for name, kind in get_type_hints(type(config)).items():
        known, value = list(_choices(kind).values()), getattr(config, name)
        if known and value not in known:
            raise InputError(f"{name} is {value!r}; choose {_listed(known)}")


def _choices(kind: Any) -> dict[str, Any]:
    """The values of a Literal, of bool or of a union of them, by how they are written; {} for other types."""
    if get_origin(kind) is Literal or kind is bool:
        return {str(value).lower() if kind is bool else value: value for value in get_args(kind) or (True, False)}
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else ()
    return {written: value for part in parts for written, value in _choices(part).items()}


def _listed(choices: Iterable[Any]) -> str:
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}"


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


def _parse(text: str, kind: Any, key: str) -> Any:
    if kind is str:
        return text
    if kind in NUMBERS:
        try:
            number = kind(text)
        except ValueError as error:
            raise InputError(f"--set {key}={text}: write {NUMBERS[kind]}") from error
        if not math.isfinite(number):
            raise InputError(f"--set {key}={text}: write a finite number")
        return number
    if get_origin(kind) is tuple:
        return tuple(_parse(part.strip(), get_args(kind)[0], key) for part in text.split(",") if part.strip())
    choices = _choices(kind)
    if (written := text if text in choices else text.lower()) not in choices:
        raise InputError(f"--set {key}={text}: choose {_listed(choices)}")
    return choices[written]
