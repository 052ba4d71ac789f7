"""What the models of the interface are made of: texts, ids, values of fields, unions that know their branch, null as left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    GetJsonSchemaHandler,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
    model_validator,
)

from traceir.index.store import MAX_ID_BYTES, check_id
from traceir.serve.faults import SAID, kind_in_json, plain

MAX_TEXT = 262_144
"""Characters of a text, for memory's sake; what is longer than the model reads is cut, and the answer says by how much."""
MAX_VALUE = 32_768
_TAGS: Final[Mapping[type, str]] = {str: "<text>", dict: "<object>", list: "<list>"}


def tag_of(value: object) -> str | None:
    """The branch of a union that a value of JSON means; `place_of` leaves it out."""
    return "<object>" if isinstance(value, BaseModel) else _TAGS.get(type(value))


def read_scalar(value: object, most: int) -> object:
    """A value of a field: a text of so many characters, a finite number, true, false or null; else ValueError."""
    if value is None or isinstance(value, int | float):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("it is not a finite number; send a number or null")
        return value
    if not isinstance(value, str):
        raise ValueError(f"{kind_in_json(value)}, where a text, a number, true, false or null is wanted")
    if len(value) > most:
        raise ValueError(f"{len(value)} characters, at most {most}")
    if plain(value) != value:
        raise ValueError(SAID["string_unicode"])
    return value


def read_end(value: object, most: int) -> object:
    """As `read_scalar`, for an end of a range, which is a number, a text, or missing."""
    if isinstance(value, bool):
        raise ValueError(f"{kind_in_json(value)}, where a text, a number or null is wanted")
    return read_scalar(value, most)


NO_ZERO = r"^[^\x00]*$"

Text = Annotated[str, StringConstraints(max_length=MAX_TEXT)]
Id = Annotated[str, StringConstraints(min_length=1, max_length=MAX_ID_BYTES, pattern=NO_ZERO), AfterValidator(check_id)]
"""At most MAX_ID_BYTES of UTF-8, which a schema cannot say."""
WHOLE: Final = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
"""In JSON 3.0 is a whole number too; "3" and true are none."""
_TEXT: Final[dict[str, Any]] = {"type": "string", "maxLength": MAX_VALUE}
_NONE: Final[dict[str, Any]] = {"type": "null"}
Scalar = Annotated[
    bool | int | float | str | None,
    PlainValidator(lambda value: read_scalar(value, MAX_VALUE)),
    WithJsonSchema({"anyOf": [{"type": "boolean"}, {"type": "number"}, _TEXT, _NONE]}),
]
End = Annotated[
    int | float | str | None,
    PlainValidator(lambda value: read_end(value, MAX_VALUE)),
    WithJsonSchema({"anyOf": [{"type": "number"}, _TEXT, _NONE]}),
]
Value = bool | int | float | str | None | list[bool | int | float | str | None]
"""A field as it is kept, which may have come by another road than this interface."""


class Lenient(BaseModel):
    """null in the place of what may be left out counts as left out."""

    model_config = ConfigDict(strict=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, told: object) -> object:
        if not isinstance(told, dict):
            return told
        optional = {name for name, field in cls.model_fields.items() if not field.is_required()}
        return {name: value for name, value in told.items() if value is not None or name not in optional}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        schema = handler(core)
        shown = handler.resolve_ref_schema(schema)
        for name, told in shown.get("properties", {}).items():
            if name not in shown.get("required", ()) and _NONE not in told.get("anyOf", ()):
                kept = {word: told.pop(word) for word in ("default", "title") if word in told}
                shown["properties"][name] = {"anyOf": [told, _NONE], **kept}
        return schema


class Strict(Lenient):
    """Unknown fields and values of another type are refused, so that a typing error does not pass silently."""

    model_config = ConfigDict(extra="forbid")


def one_of(wanted: str) -> Discriminator:
    """Chooses the branch of a union by the kind of the value, so that errors are those of the branch that was meant."""
    return Discriminator(tag_of, custom_error_type="kind", custom_error_message=f"{wanted} is wanted")
