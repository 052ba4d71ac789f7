"""The list of published models."""

from __future__ import annotations

import json

import pytest

from traceir.catalogue import KNOWN, profile_for
from traceir.checkpoint import bundled_model, is_hub_id
from traceir.cli.main import main
from traceir.model import load
from traceir.profiles import PROFILES


def test_every_row_can_be_asked_for() -> None:
    assert len({known.id for known in KNOWN}) == len(KNOWN)
    for known in KNOWN:
        kind, _, name = known.read_by.partition(" ")
        assert kind in ("profile", "sentence-transformers", "trace") and (kind != "profile" or name in PROFILES)
        assert known.id == "bundled" or is_hub_id(known.id)
        assert profile_for(known.id) == (name or None)
    assert {known.read_by.partition(" ")[2] for known in KNOWN} - {""} == set(PROFILES), "every profile has a model"
    assert profile_for("alibaba-nlp/GME-qwen2-vl-2b-instruct") == "gme", "as the hub, which knows no capitals"
    assert profile_for("someone/else") is None
    model = load(bundled_model())
    assert (KNOWN[0].parameters, KNOWN[0].width) == (sum(each.numel() for each in model.network.parameters()), model.width)


def test_models_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{known.id}\n" in shown for known in KNOWN) and shown.count("verified: ") == len(KNOWN)
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [known.id for known in KNOWN]
    assert all(row["memory"] == 2 * row["parameters"] for row in rows)
