"""Known models."""

from __future__ import annotations


def profile_for(hub_id: str) -> str | None:
    return None
