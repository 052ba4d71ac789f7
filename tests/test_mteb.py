"""`traceir mteb`: every kind of task that MIEB has, through mteb's own classes; scores by hand, resume, what cannot run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import mteb
import mteb_tasks as drawn
import numpy as np
import pytest
from mteb.abstasks import AbsTask
from mteb.cache import ResultCache
from mteb.get_tasks import _TASKS_REGISTRY
from mteb.types import PromptType
from PIL import Image
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from traceir.cli import main as cli
from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.evaluation import mteb_run
from traceir.evaluation.mteb_model import TraceEncoder
from traceir.images import ImageInput
from traceir.items import Item, Query

TASKS = str(Path(drawn.__file__))
Verb = Callable[..., int]


@pytest.fixture
def verb(encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> Verb:
    """The command line over the session's encoder, offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("traceir.cli.learn_verbs.open_encoder", lambda args: encoder)
    return lambda *words: cli.main(["mteb", "--tasks-from", TASKS, *map(str, words)])


@dataclass(frozen=True)
class Scored:
    """All tasks of the module, scored once by the command line: its exit code, what it said, what it wrote."""

    out: Path
    code: int
    said: str
    told: str
    results: dict[str, Any]

    def __getitem__(self, name: str) -> float:
        found = next(one["score"] for one in self.results["tasks"] if one["task"] == name)
        assert isinstance(found, float)
        return found

    def by_state(self, state: str) -> set[str]:
        return {one["task"] for one in self.results["tasks"] if one["state"] == state}


@pytest.fixture(scope="module")
def scored(encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    out = tmp_path_factory.mktemp("mteb") / "out"
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as said, redirect_stderr(StringIO()) as told:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("traceir.cli.learn_verbs.open_encoder", lambda args: encoder)
        code = cli.main(["mteb", "--tasks-from", TASKS, "--out", str(out), "--name", "local/mini"])
    return Scored(out, code, said.getvalue(), told.getvalue(), json.loads((out / "results.json").read_text()))


def kind(task: AbsTask) -> type:
    """mteb's own class below a task: the last of its kind that is mteb's and not of its data."""
    return next(one for one in type(task).__mro__ if one.__name__.startswith("AbsTask"))


def test_the_drawn_tasks_are_of_every_class_type_and_side_that_mieb_has() -> None:
    ours = mteb_run.choose_tasks([], [], TASKS)
    theirs = [
        task for name in ("MIEB(lite)", "MIEB(eng)", "MIEB(Multilingual)", "MIEB(Img)") for task in mteb.get_benchmark(name).tasks
    ]
    assert len(theirs) > 150
    assert {kind(task) for task in theirs} <= {kind(task) for task in ours}
    assert {task.metadata.type for task in theirs} <= {task.metadata.type for task in ours}
    assert {side for task in theirs for side in mteb_run.needs(task)} <= {side for task in ours for side in mteb_run.needs(task)}


def test_every_kind_is_scored_and_the_rest_is_named(scored: Scored) -> None:
    assert scored.code == 1, "two of them have no score"
    assert scored.by_state("skipped") == {"DrawnAudio"}
    assert "- 1 skipped: it has inputs of audio, and the model reads text and image and image,text: DrawnAudio" in scored.said
    assert scored.by_state("failed") == {"DrawnAbsent"} and "the hub does not answer: DrawnAbsent" in scored.said
    assert len(scored.by_state("scored")) == 21 and "23/23  DrawnSlow  cosine_spearman" in scored.told
    assert "Traceback" not in scored.told
    assert scored.by_state("scored") == {path.stem for path in scored.out.rglob("Drawn*.json")}
    values = [one["score"] for one in scored.results["tasks"] if one["score"] is not None]
    assert scored.results["means"]["tasks"] == pytest.approx(np.mean(values))
    assert scored.said.strip() in (scored.out / "results.md").read_text()


def test_what_is_scored_is_not_scored_again(verb: Verb, scored: Scored, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("--out", scored.out, "--name", "local/mini", "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "23 tasks: 21 scored, 1 skipped, 1 here"
    files = {path: path.stat().st_mtime_ns for path in scored.out.rglob("Drawn*.json")}
    assert verb("--out", scored.out, "--name", "local/mini", "-t", "DrawnSTS,DrawnBoth", "-t", "DrawnZeroShot") == 0
    assert capsys.readouterr().err.count("scored before") == 3
    assert files == {path: path.stat().st_mtime_ns for path in scored.out.rglob("Drawn*.json")}


def test_a_dry_run_writes_nothing(verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("--out", tmp_path / "out", "-t", "DrawnIT2I,CIRRIT2IRetrieval,DrawnAudio", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["here", "reach"] and "image + image,text" in lines[0]
    assert lines[-1] == "3 tasks: 1 here, 1 out of reach, 1 skipped"
    assert not (tmp_path / "out").exists()


def vectors(encoder: Encoder, contents: list[Any]) -> np.ndarray:
    """Of pictures and texts as items, each encoded alone."""
    made = [Item.of(text=one) if isinstance(one, str) else Item.of(image=ImageInput.from_pil(one)) for one in contents]
    return np.stack([encoder.encode_items([item])[0].vector for item in made])


def test_zero_shot_accuracy_by_hand(encoder: Encoder, scored: Scored) -> None:
    labels = vectors(encoder, drawn.DrawnZeroShot().get_candidate_labels())
    found = (vectors(encoder, [drawn.draw(n) for n in range(16)]) @ labels.T).argmax(1)
    assert scored["DrawnZeroShot"] == np.mean(found == np.arange(16) % 4) == 0.625


def test_visual_sts_spearman_by_hand_and_its_aggregate(encoder: Encoder, scored: Scored) -> None:
    split = drawn.DrawnSTS().splits()["test"]
    first, second = (vectors(encoder, list(split[column])) for column in ("sentence1", "sentence2"))
    found = spearmanr(split["score"], (first * second).sum(1)).statistic
    assert scored["DrawnSTS"] == pytest.approx(found, abs=1e-6)
    assert abs(found) > 0.1
    assert scored["DrawnBoth"] == pytest.approx((found + scored["DrawnSTSMore"]) / 2, abs=1e-6)


def test_compositionality_by_hand(encoder: Encoder, scored: Scored) -> None:
    split = drawn.DrawnPairs().splits()["test"]
    right = []
    for sample in split:
        images = vectors(encoder, [sample["image_0"], sample["image_1"]])
        captions = vectors(encoder, [sample["caption_0"], sample["caption_1"]])
        found = images @ captions.T
        right.append((found.argmax(0) == [0, 1]).all() and (found.argmax(1) == [0, 1]).all())
    assert scored["DrawnPairs"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1


def test_multiple_choice_by_hand(encoder: Encoder, scored: Scored) -> None:
    """The best of a query's three choices is the right one; queries of picture and text may reason."""
    task = drawn.DrawnChoice()
    task.load_data()
    split, right = task.dataset["default"]["test"], []
    documents = dict(zip(split["corpus"]["id"], vectors(encoder, list(split["corpus"]["text"])), strict=True))
    for row in split["queries"]:
        query = Query.of(text=row["text"], image=ImageInput.from_pil(row["image"]), target="text")
        (asked,) = encoder.encode_queries([query])
        choices = split["top_ranked"][row["id"]]
        best = max(choices, key=lambda id: float(asked.vector @ documents[id]))
        right.append(split["relevant_docs"][row["id"]][best])
    assert len(choices) == 3 and 0 < np.mean(right) < 1
    assert scored["DrawnChoice"] == pytest.approx(np.mean(right))


def test_the_size_of_batches_changes_no_score(encoder: Encoder, scored: Scored, tmp_path: Path) -> None:
    """A wrapper of another model moved EDIR's R@1 from 34.6 to 46.1 by it (mteb's pull request 5247)."""
    names = ["DrawnZeroShot", "DrawnSTS", "DrawnPairs", "DrawnIT2IT", "DrawnChoice"]
    for size in (1, 5):
        run = mteb_run.Run(TraceEncoder.of(encoder, "local/mini"), tmp_path / str(size), batch_size=size)
        for one in mteb_run.score(run, mteb_run.choose_tasks([], names, TASKS)):
            assert one.score == pytest.approx(scored[one.task], abs=1e-6), (size, one.task)


def test_one_input_may_hold_several_images_and_text(encoder: Encoder) -> None:
    about = drawn.DrawnIT2IT.metadata
    pictures = [drawn.draw(1), drawn.draw(2)]
    options: dict[str, Any] = {"task_metadata": about, "hf_split": "test", "hf_subset": "default"}
    found = TraceEncoder.of(encoder).encode([{"image": [pictures, pictures[:1]], "text": ["both", ""]}], **options)
    known = [Item((*map(ImageInput.from_pil, pictures), "both")), Item((ImageInput.from_pil(pictures[0]),))]
    assert np.abs(found - [one.vector for one in encoder.encode_items(known)]).max() < 1e-6
    with pytest.raises(InputError, match="video"):
        TraceEncoder.of(encoder).encode([{"text": ["a"], "video": ["b"]}], **options)


class Words:
    """An encoder of texts alone, such as sentence-transformers has, that notes what it is asked."""

    fingerprint, prompt_version, width, modalities = "words", "none", 2, ("text",)

    def __init__(self) -> None:
        self.asked: list[Query] = []

    def encode_queries(self, queries: list[Query], *, route: str = "auto") -> list[Any]:
        self.asked += queries
        return self.encode_items(queries)

    def encode_items(self, items: list[Any]) -> list[Any]:
        assert not any(item.images for item in items)
        lengths = [float(len(item.text)) for item in items]
        return [SimpleNamespace(vector=np.array([np.cos(x), np.sin(x)], dtype=np.float32)) for x in lengths]


def test_what_a_model_does_not_read_is_skipped_by_name(tmp_path: Path) -> None:
    words = Words()
    outcomes = mteb_run.score(mteb_run.Run(TraceEncoder.of(words), tmp_path), mteb_run.choose_tasks([], [], TASKS))
    done = {one.task for one in outcomes if one.state == "scored"}
    assert done == {"DrawnTextSTS", "DrawnT2T", "DrawnRerank", "DrawnSlow"}
    pages = next(one for one in outcomes if one.task == "DrawnPages")
    assert pages.state == "skipped" and pages.reason == "it has inputs of image, and the model reads text"
    assert json.loads(next(tmp_path.rglob("model_meta.json")).read_text())["modalities"] == ["text"]
    assert {query.instruction for query in words.asked} == {None}, "a task without a prompt has none"
    assert "image,text" in mteb_run.lacks(drawn.DrawnIT2I(), ("text", "image")), "as with CLIP"
    assert not mteb_run.lacks(drawn.DrawnPairs(), ("text", "image"))


def test_queries_alone_have_the_tasks_prompt_and_route(encoder: Encoder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[Query] = []
    monkeypatch.setattr(
        Encoder, "encode_queries", lambda self, queries, *, route="auto": asked.extend(queries) or self.encode_items(queries)
    )
    run = mteb_run.Run(TraceEncoder.of(encoder), tmp_path)
    mteb_run.score(run, mteb_run.choose_tasks([], ["DrawnSTS", "DrawnZeroShot", "DrawnPairs"], TASKS))
    assert not asked
    monkeypatch.setattr(
        Encoder, "encode_items", lambda self, items: [SimpleNamespace(vector=np.ones(2, np.float32)) for _ in items]
    )
    mteb_run.score(run, mteb_run.choose_tasks([], ["DrawnI2I"], TASKS))
    assert {(query.instruction, query.target) for query in asked} == {("Find a picture of the same colour.", "image")}


def test_a_killed_run_goes_on_behind_what_is_scored(
    verb: Verb, scored: Scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process of its own, because it is killed, in the middle of the third of four tasks; no hub answers it."""
    own, words = "DrawnZeroShot,DrawnSlow,DrawnI2T", ["--out", str(tmp_path / "out"), "--name", "local/mini"]
    surroundings = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "DRAWN_WAIT": "1"}
    with (tmp_path / "told").open("w") as told:
        started = subprocess.Popen(
            [sys.executable, "-m", "traceir", "mteb", "--tasks-from", TASKS, "-t", f"CIRRIT2IRetrieval,{own}", *words],
            stderr=told, env={**surroundings, **away},
        )  # fmt: skip
        try:
            while not (first := list(tmp_path.rglob("DrawnZeroShot.json"))):
                assert started.poll() is None, (tmp_path / "told").read_text()
                time.sleep(0.05)
        finally:
            started.send_signal(signal.SIGKILL)
            started.wait()
    lines = (tmp_path / "told").read_text().splitlines()
    assert lines[0] == "note: the Hugging Face hub does not answer; tasks can run whose data are on this machine"
    assert not any("Traceback" in line or "CIRR" in line for line in lines)
    (missing, *_) = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert (missing["task"], missing["state"]) == ("CIRRIT2IRetrieval", "failed") and "the hub does not answer" in missing[
        "reason"
    ]
    words += ["-t", own]
    before = first[0].stat().st_mtime_ns
    assert not list(tmp_path.rglob("DrawnSlow.json"))
    assert verb(*words) == 0
    said = capsys.readouterr().err
    assert "1/3  DrawnZeroShot  accuracy 62.50  scored before" in said and said.count("scored before") == 1
    assert first[0].stat().st_mtime_ns == before
    for one in json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]:
        assert one["score"] == pytest.approx(scored[one["task"]], abs=1e-6)


def test_half_a_result_counts_as_none(encoder: Encoder, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, tasks = (
        mteb_run.Run(TraceEncoder.of(encoder, "local/mini"), tmp_path),
        mteb_run.choose_tasks([], ["DrawnTextSTS"], TASKS),
    )
    (whole,) = mteb_run.score(run, tasks)
    file = next(tmp_path.rglob("DrawnTextSTS.json"))
    file.write_text(file.read_text()[:200])
    (again,) = mteb_run.score(run, tasks)
    assert again.state == "scored" and again.score == whole.score and "DrawnTextSTS" in caplog.text
    assert json.loads(file.read_text())["task_name"] == "DrawnTextSTS"


def test_a_write_that_fails_leaves_what_was_there(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, tasks = (
        mteb_run.Run(TraceEncoder.of(encoder, "local/mini"), tmp_path),
        mteb_run.choose_tasks([], ["DrawnTongues"], TASKS),
    )
    mteb_run.score(run, tasks)
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}
    result = ResultCache(tmp_path).load_results(require_model_meta=False)[0].task_results[0]

    def fails(self: Any, path: Path) -> None:
        path.write_text("{")
        raise OSError("the disk is full")

    monkeypatch.setattr(type(result), "to_disk", fails)
    with pytest.raises(OSError, match="full"):
        mteb_run.Results(tmp_path).save_to_cache(result, run.model.mteb_model_meta)
    assert before == {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}


def test_mteb_reads_the_results_and_means_the_same(encoder: Encoder, scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = ResultCache(scored.out).load_results(models=["local/mini"]).model_results
    assert model.model_name == "local/mini" and model.model_revision.startswith(f"{encoder.fingerprint}-")
    known = {name: scored[name] for name in scored.by_state("scored")}
    assert {one.task_name: one.get_score() for one in model.task_results} == pytest.approx(known, abs=1e-6)
    names = ["DrawnSTS", "DrawnSTSMore", "DrawnZeroShot", "DrawnI2I", "DrawnI2T"]
    board = mteb.Benchmark(name="Drawn", tasks=mteb_run.choose_tasks([], names, TASKS))
    for task in board.tasks:  # where mteb's leaderboard looks types up
        monkeypatch.setitem(_TASKS_REGISTRY, task.metadata.name, type(task))
    (row,) = ResultCache(scored.out).load_results(models=["local/mini"], tasks=board).get_benchmark_result().to_dict("records")
    ours = mteb_run.means([mteb_run.Outcome(**one) for one in scored.results["tasks"] if one["task"] in names])
    assert (row["Mean (Task)"], row["Mean (TaskType)"]) == pytest.approx((ours["tasks"], ours["types"]), abs=1e-6)


def test_scores_of_other_templates_or_budgets_are_not_taken_for_these(encoder: Encoder, tmp_path: Path) -> None:
    class Other(Words):
        prompt_version = "other"

    class Shorter(Words):
        vector_settings = MappingProxyType({"max_text_tokens": 8})

    tasks = mteb_run.choose_tasks([], ["DrawnTextSTS"], TASKS)
    states = [
        mteb_run.score(mteb_run.Run(TraceEncoder.of(kind()), tmp_path), tasks)[0].state for kind in (Words, Other, Shorter, Words)
    ]
    assert states == ["scored", "scored", "scored", "kept"]


def test_names_that_nobody_knows(verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["-b", "MIEB(light)"], "did you mean 'MIEB(lite)'"),
        (["-t", "DrawnZeroShoot"], "did you mean 'DrawnZeroShot'"),
        (["-t", "CVBenchCounts"], "did you mean 'CVBenchCount'"),
        (["--tasks-from", str(tmp_path / "none.py")], "no such file"),
        (["--tasks-from", "json"], "json defines no mteb task"),
        (["--tasks-from", "no_such_module"], "No module named 'no_such_module'"),
        (["--name", "mini"], "OWNER/NAME"),
        (["-t", "DrawnAbsent"], "none of 1 tasks has a score"),
    ):
        assert verb("--out", tmp_path / "out", *words) == 2, words
        assert message in capsys.readouterr().err
    assert cli.main(["mteb", "--out", str(tmp_path)]) == 2
    assert "nothing to score" in capsys.readouterr().err


def test_a_model_is_named_by_its_hub_id_or_folder(tmp_path: Path) -> None:
    assert mteb_run.label("Qwen/Qwen3-VL-Embedding-2B") == "Qwen/Qwen3-VL-Embedding-2B"
    (tmp_path / "my model").mkdir()
    assert mteb_run.label(str(tmp_path / "my model")) == "local/my-model"


def test_batches_of_any_size_give_the_same_vectors(encoder: Encoder) -> None:
    """Texts and pictures of different sizes, so that rows of one batch are padded."""
    about = drawn.DrawnIT2IT.metadata
    rows = [{"text": drawn.say(n) * (1 + n % 3), "image": drawn.draw(n)} for n in range(7)]

    def encode(size: int, prompt_type: PromptType) -> np.ndarray:
        loader = DataLoader(
            rows, batch_size=size, collate_fn=lambda batch: {key: [one[key] for one in batch] for key in batch[0]}
        )
        return TraceEncoder.of(encoder).encode(
            loader, task_metadata=about, hf_split="test", hf_subset="default", prompt_type=prompt_type, batch_size=size
        )

    assert isinstance(rows[0]["image"], Image.Image)
    for side in PromptType:
        whole = encode(7, side)
        assert all(np.abs(encode(size, side) - whole).max() < 1e-5 for size in (1, 3))
