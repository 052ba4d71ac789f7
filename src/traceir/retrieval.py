"""From vectors and words to hits."""

from __future__ import annotations

from typing import Final, Literal

Mode = Literal["vector", "keyword", "hybrid"]
MAX_WEIGHT: Final = 10.0
