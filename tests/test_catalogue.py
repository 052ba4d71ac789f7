"""The list of published models."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from traceir.catalogue import KNOWN, profile_for
from traceir.checkpoint import bundled_model, is_hub_id
from traceir.cli.main import main
from traceir.model import load
from traceir.profiles import PROFILES


def test_every_row_can_be_asked_for() -> None:
    assert len({one.id for one in KNOWN}) == len(KNOWN)
    for one in KNOWN:
        kind, _, name = one.road.partition(" ")
        assert kind in ("profile", "sentence-transformers", "trace") and (kind != "profile" or name in PROFILES)
        assert one.id == "bundled" or is_hub_id(one.id)
        assert profile_for(one.id) == (name or None)
    assert {one.road.partition(" ")[2] for one in KNOWN} - {""} == set(PROFILES), "every profile has a model"
    assert profile_for("alibaba-nlp/GME-qwen2-vl-2b-instruct") == "gme", "as the hub, which knows no capitals"
    assert profile_for("someone/else") is None
    model = load(bundled_model())
    assert (KNOWN[0].parameters, KNOWN[0].width) == (sum(one.numel() for one in model.network.parameters()), model.width)


def test_models_lists_them_without_torch(capsys: pytest.CaptureFixture[str]) -> None:
    script = "import sys; from traceir.cli.main import main; main(['models']); sys.exit('torch' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert all(f"{one.id}\n" in told for one in KNOWN) and told.count("verified: ") == len(KNOWN)
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["id"] for row in rows] == [one.id for one in KNOWN]
    assert all(row["memory"] == 2 * row["parameters"] for row in rows)
