"""What TraceIR wrote at commit c33a2b9 opens and goes on: an index, checkpoints, run folders, a build of M-BEIR-CoT, a journal.

The files are in fixtures/c33a2b9.zip, with what the old code itself made of them in the end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow.parquet import read_table
from safetensors.numpy import load_file

from traceir.cli.main import main
from traceir.cot.scripted.teacher_server import MODEL, running
from traceir.data.cot import read_cot
from traceir.encoder import Encoder
from traceir.items import Query

ARCHIVE = Path(__file__).parent / "fixtures" / "c33a2b9.zip"
STAGES = ("assess", "reason", "filter", "verify")


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The unpacked files, as the working directory: paths in them are relative."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        archive.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    code = main(["--threads", "1", *words])
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def weights(folder: Path) -> dict[str, Any]:
    return {name: load_file(file)[name] for file in sorted(folder.glob("*.safetensors")) for name in load_file(file)}


def test_an_index_is_searched_filled_and_emptied(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--index", "index", "--model", "whole/checkpoint")
    asked = {
        "text": ["--text", "a red thing"],
        "image": ["--image", "data/mbeir_images/5.png"],
        "where": ["--text", "blue", "--where", "colour=red"],
    }
    expected = json.loads((old / "searches.json").read_text())
    for name, words in asked.items():
        hits = json.loads(run(capsys, "search", *model, "--json", "-k", "5", *words))["hits"]
        assert [hit["id"] for hit in hits] == [hit["id"] for hit in expected[name]["hits"]]
        assert [hit["fields"] for hit in hits] == [hit["fields"] for hit in expected[name]["hits"]]
        scores = [[hit["score"] for hit in own] for own in (hits, expected[name]["hits"])]
        np.testing.assert_allclose(*scores, atol=2e-6)
    assert "32 items in index" in run(capsys, "index", "add", "items.jsonl", *model)
    run(capsys, "index", "rm", "thing-7", "--index", "index")
    hits = json.loads(run(capsys, "search", *model, "--json", "-k", "5", *asked["text"]))["hits"]
    assert hits[0]["id"] == "thing-1" and "thing-7" not in [hit["id"] for hit in hits]


@pytest.mark.parametrize("name", ["whole/checkpoint", "whole-lora/checkpoint"])
def test_a_checkpoint_and_an_adapter_encode_as_before(old: Path, name: str) -> None:
    expected = json.loads((old / "encodings.json").read_text())[name]
    encoder = Encoder.from_pretrained(name)
    assert encoder.fingerprint == expected["fingerprint"]
    image = "data/mbeir_images/{}.png".format
    queries = [
        Query.of(text="make it red", target="image"),
        Query.of(image=image(3), text="make it blue", target="image"),
        Query.of(image=image(4)),
    ]
    encodings = encoder.encode_queries(queries)
    assert [encoding.route for encoding in encodings] == expected["routes"]
    np.testing.assert_allclose([encoding.vector for encoding in encodings], expected["vectors"], atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "whole"), [("run", "whole"), ("run-lora", "whole-lora")])
def test_a_killed_run_goes_on_to_the_weights_of_one_that_was_not(old: Path, name: str, whole: str) -> None:
    """From the fourth step of six, with all that the old run's configuration says, by the names of then."""
    config = json.loads((old / name / "config.json").read_text())
    settings = {key: value for key, value in config.items() if isinstance(value, bool | int | float | str) and value != ""}
    settings |= {f"size.{key}": value for key, value in config["size"].items()} | {"keep": "2"}
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    script = (
        "from traceir.data.settings import override\nfrom traceir.train.train import TrainConfig, train\n"
        f"train(override(TrainConfig(data='data', out={name!r}), {words}))"
    )
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    resumed, unbroken = weights(old / name / "checkpoint"), weights(old / whole / "checkpoint")
    assert resumed.keys() == unbroken.keys()
    for tensor in resumed:
        np.testing.assert_allclose(resumed[tensor], unbroken[tensor], atol=1e-5, err_msg=tensor)
    steps = [json.loads(line).get("step") for line in (old / name / "log.jsonl").read_text().splitlines()]
    assert steps[-1] == 6


@pytest.mark.slow
def test_a_killed_build_goes_on_and_asks_nothing_twice(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    journal = [json.loads(line)["key"] for line in (old / "cot/journal/0000-of-0001.jsonl").read_text().splitlines()]
    with running("data", log=old / "teacher.jsonl") as url:
        command = ["reasoning", "build", "--data", "data", "--out", "cot", "--teacher", url, "--model", MODEL]
        run(capsys, *command, "--set", "limits.reasoning_least=4", "--set", "part_size=8")
    asked = [json.loads(line) for line in (old / "teacher.jsonl").read_text().splitlines()]
    assert not {line["key"] for line in asked if line["event"] == "end"} & set(journal)
    for stage in STAGES:
        for part in (old / "cot-whole" / stage).glob("*.jsonl"):
            assert (old / "cot" / stage / part.name).read_bytes() == part.read_bytes(), part
    samples, expected = (
        read_table(old / out / "dataset/train-00000-of-00001.parquet").to_pylist() for out in ("cot", "cot-whole")
    )
    assert len(samples) == 32 and samples == expected
    assert sum(len(task) for task in read_cot("cot-whole/dataset")) == 32
