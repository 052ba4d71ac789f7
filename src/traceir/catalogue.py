"""Published models that are known (catalogue.json): how each is read here, what it takes, and how that was verified.

Sizes, widths and licences are those of mteb 2.26.24's model cards and of the models' own pages on the hub; sizes of networks over
Qwen were counted on transformers' classes with their published configurations. What no source said is None. Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

BYTES: Final = 2
"""Bytes of a parameter in bfloat16."""


@dataclass(frozen=True, slots=True)
class Known:
    """One published model.

    `read_by`: `profile NAME`, `sentence-transformers` (its own files), or `trace` (TRACE's prompts). `modalities` of one input;
    a model without `image,text` takes no input of both. `verified` says what was compared with what; nowhere the published
    weights, which were not at hand.
    """

    id: str
    read_by: str
    parameters: int
    width: int
    licence: str | None
    modalities: tuple[str, ...]
    verified: str
    reasons: bool = False
    note: str = ""

    @property
    def memory(self) -> int:
        """Bytes of the weights alone in bfloat16; float32, the default, takes twice as many."""
        return self.parameters * BYTES

    def as_json(self) -> dict[str, Any]:
        row = asdict(self)
        return {"road": row.pop("read_by"), **row, "memory": self.memory}

    def __str__(self) -> str:
        """A paragraph for a terminal."""
        sizes = f"{_short(self.parameters)} parameters, {_short(self.memory)}B in bfloat16, width {self.width}"
        takes = " | ".join(self.modalities) + ("; may reason" if self.reasons else "")
        lines = (f"{self.read_by}; {sizes}; licence {self.licence or 'not known'}", f"takes {takes}", self.note)
        return "\n    ".join([self.id, *filter(None, lines), f"verified: {self.verified}"])


def _short(number: int) -> str:
    """Three digits with G (10^9) or M (10^6)."""
    return f"{number / 1e9:.3g} G" if number >= 1e9 else f"{number / 1e6:.3g} M"


_ROWS: Final[list[dict[str, Any]]] = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
KNOWN: Final = tuple(Known(**{**row, "modalities": tuple(row["modalities"])}) for row in _ROWS)


def profile_for(hub_id: str) -> str | None:
    """The name of the profile that a published checkpoint is read by; None for one that needs none, or is not known."""
    readers = (model.read_by for model in KNOWN if model.id.lower() == hub_id.lower())
    return next(readers, "").partition("profile ")[2] or None


def described() -> str:
    """The list for a terminal."""
    return "\n".join(map(str, KNOWN))
