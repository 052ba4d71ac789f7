"""The data card of M-BEIR-CoT: valid front matter, readable by `datasets` as it lies there, and ready for the hub."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
from huggingface_hub import DatasetCard
from test_cot_quality import outcome

from traceir.cot.plan import FORMAT, NAME, BuildConfig
from traceir.cot.products import CANDIDATE, COLUMNS, push_cot, write_cot_card
from traceir.cot.quality.quality import measure
from traceir.cot.rules import RuleLimits
from traceir.data.cot import write_rows
from traceir.errors import DataError, InputError

BAD = "bad: [x]\n---\n- | `y` <b>"
"""A name that would break YAML, a table, and Markdown."""


def rows() -> Iterator[dict[str, Any]]:
    """Five rows of two tasks; the two complex ones come last, so that types cannot be guessed from the first file."""
    image = {"did": "9:1", "txt": None, "img_path": "pictures/b.png", "modality": "image"}
    direct = {"task": "invented_task0", "task_id": 0, "dataset_id": 9, "query_txt": "make it red", "query_img_path": None,
              "query_modality": "text", "cand_modality": "image", "z": 0, "reasoning": None, "answer": None, "steps": None,
              "pos_cand_list": ["9:1"], "positives": [image], "negatives": [], "provenance": None}  # fmt: skip
    reasoned = {"task": "invented|b_task7", "task_id": 7, "query_img_path": "pictures/a.png", "query_modality": "image,text",
                "z": 1, "reasoning": "the chair is blue; make it red", "answer": "a red chair", "steps": 0,
                "provenance": json.dumps({"teacher": BAD})}  # fmt: skip
    for number in range(5):
        yield {"qid": f"9:{number}", **direct, **(reasoned if number >= 3 else {})}


@pytest.fixture(params=["parquet", "jsonl"])
def built(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A build's folder: settings, funnel, and a data set of three files."""
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    out.mkdir()
    (data / "meta.json").write_text(json.dumps({"name": BAD}))
    settings = asdict(BuildConfig(str(data), BAD, direct=("invented_task0",), limits=RuleLimits(reasoning_least=17)))
    identity = {"name": NAME, "format": FORMAT, "prompts": "cot-1+0123", "data_fingerprint": None}
    (out / "build.json").write_text(json.dumps(settings | identity))
    (out / "funnel.json").write_text(json.dumps({"all": {"queries": 12, "kept": 2, "rule:tags": 7, "rule:language": 1}}))
    write_rows(rows(), data, out / "dataset", format=request.param, rows_per_file=2)
    return out


def test_card_is_valid_and_the_folder_loads(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    folder = built / "dataset"
    text = write_cot_card(folder, built, licence="cc-by-4.0")
    card = DatasetCard(text)
    assert card.data.license == "cc-by-4.0" and card.data.size_categories == "n<1K"
    assert card.data.pretty_name == "M-BEIR-CoT, bad: [x] --- - | `y` <b>, by bad: [x] --- - | `y` <b>"
    parts = "unasked: `invented_task0` (z = 0)", "17 to 256", "| dropped by `tags` | 7 |", "Not measured yet"
    assert all(part in card.text for part in parts)
    assert "invented\\|b_task7 | 2 | 2 | 0 |" in card.text and "\\<b\\>" in card.text and str(tmp_path) not in text
    for name in ("arrow", "writing"):  # a cache of `datasets`, and a write that was killed
        (folder / name).mkdir()
        (folder / name / "train-00000-of-00001.jsonl").write_text('{"other": 1}\n')
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(loaded) == list(rows())
    assert list(loaded.features) == list(COLUMNS)
    assert [*loaded.features["positives"].feature] == list(CANDIDATE)
    assert loaded.features["steps"].dtype == "int32" and loaded.features["reasoning"].dtype == "string"


@pytest.mark.parametrize("built", ["parquet"], indirect=True)
def test_card_tells_what_was_measured(built: Path) -> None:
    folder = built / "dataset"
    man = "*an* old man | waits"
    figures = measure([outcome("1:1", man, target="a bench"), outcome("1:2", man, "the bench", target="some bench")])
    text = write_cot_card(folder, built, quality=figures)
    assert "Hallucinated: not reviewed." in text and "100.0 % of 2 samples. gender 2 (man); age 2 (old)" in text
    assert "50.0 % of the reasonings repeat another" in text and "200 tokens read and 20 written, for" in text
    assert "- | waits" not in text  # no text of the data
    other = measure([outcome("1:1", man)])
    assert "Not measured yet" in write_cot_card(folder, built, quality=other)  # of one sample, the data have two
    assert "The build was not given" in write_cot_card(folder)
    (folder / "README.md").write_text("mine")
    assert write_cot_card(folder, built) == "mine" == (folder / "README.md").read_text()
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="assemble"):
        push_cot(folder, "somebody/data")


@pytest.mark.parametrize("built", ["parquet"], indirect=True)
def test_push_takes_card_manifest_and_its_files_alone(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hub itself does and refuses is tested with the push of models."""
    folder, api = built / "dataset", MagicMock()
    with pytest.raises(DataError, match=r"README\.md"):
        push_cot(folder, "somebody/data")
    write_cot_card(folder, built)
    monkeypatch.setattr("traceir.data.hub.HfApi", lambda: api)
    (folder / "notes.txt").write_text("stays here")
    listing = push_cot(folder, "somebody/data")
    assert "train-00002-of-00003.parquet" in listing and "nothing was uploaded" in listing and "notes" not in listing
    assert not api.mock_calls
    push_cot(folder, "somebody/data", dry_run=False)
    assert api.create_repo.call_args.kwargs == {"repo_type": "dataset", "private": True, "exist_ok": True}
    files = [f"train-0000{n}-of-00003.parquet" for n in range(3)]
    assert api.upload_folder.call_args.kwargs["allow_patterns"] == ["README.md", "manifest.json", *files]
    with pytest.raises(InputError, match="OWNER/NAME"):
        push_cot(folder, "no good name")
    with (folder / files[1]).open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(DataError, match=files[1]):
        push_cot(folder, "somebody/data")
