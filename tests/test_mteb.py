"""`traceir mteb`: every kind of task that MIEB has, through mteb's own classes; scores by hand, resume, what cannot run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import mteb
import mteb_tasks as drawn
import numpy as np
import pytest
from evaluations import Planned
from mteb.cache import ResultCache
from mteb.get_tasks import _TASKS_REGISTRY
from scipy.stats import spearmanr

from traceir.cli import main as cli
from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.evaluation import mteb_run
from traceir.evaluation.mteb_model import TraceEncoder
from traceir.images import ImageInput
from traceir.items import Item, Query

pytestmark = pytest.mark.slow

TASKS = str(Path(drawn.__file__))
NAME = ("--name", "local/mini")
Verb = Callable[..., int]


@pytest.fixture(scope="module")
def verb(encoder: Encoder) -> Iterator[Verb]:
    """The command line over the session's encoder, offline."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("traceir.cli.learn_verbs.open_encoder", lambda args: encoder)
        yield lambda *words: cli.main(["mteb", "--tasks-from", TASKS, *map(str, words)])


@dataclass(frozen=True)
class Scored:
    """All tasks of the module, scored once by the command line: its exit code, its output and errors, what it wrote."""

    out: Path
    code: int
    output: str
    errors: str
    results: dict[str, Any]

    def __getitem__(self, name: str) -> float:
        return float(next(task["score"] for task in self.results["tasks"] if task["task"] == name))

    def by_state(self, state: str) -> set[str]:
        return {task["task"] for task in self.results["tasks"] if task["state"] == state}


@pytest.fixture(scope="module")
def scored(verb: Verb, tmp_path_factory: pytest.TempPathFactory) -> Scored:
    out = tmp_path_factory.mktemp("mteb") / "out"
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        code = verb("--out", out, *NAME)
    return Scored(out, code, output.getvalue(), errors.getvalue(), json.loads((out / "results.json").read_text()))


def test_the_drawn_tasks_are_of_every_class_type_and_side_that_mieb_has() -> None:
    def kinds(tasks: list[Any]) -> tuple[set[Any], set[str], set[str]]:
        classes = {next(base for base in type(task).__mro__ if base.__name__.startswith("AbsTask")) for task in tasks}
        return classes, {task.metadata.type for task in tasks}, {side for task in tasks for side in mteb_run.needs(task)}

    boards = [mteb.get_benchmark(name) for name in ("MIEB(lite)", "MIEB(eng)", "MIEB(Multilingual)", "MIEB(Img)")]
    theirs = [task for board in boards for task in board.tasks]
    assert len(theirs) > 150
    ours = kinds(mteb_run.choose_tasks([], [], TASKS))
    assert all(wanted <= ours[index] for index, wanted in enumerate(kinds(theirs)))
    with pytest.raises(InputError, match=r"no benchmark 'MIEB\(light\)' \(did you mean 'MIEB\(lite\)'"):
        mteb_run.choose_tasks(["MIEB(light)"], [])


def test_every_kind_is_scored_the_rest_is_named_and_nothing_is_scored_twice(
    scored: Scored, verb: Verb, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scored.code == 1, "two of them have no score"
    assert scored.by_state("skipped") == {"DrawnAudio"} and scored.by_state("failed") == {"DrawnAbsent"}
    assert "- 1 skipped: it has inputs of audio, and the model reads text and image and image,text: DrawnAudio" in scored.output
    assert "the hub does not answer: DrawnAbsent" in scored.output and "Traceback" not in scored.errors
    assert len(scored.by_state("scored")) == 21 and "  DrawnSlow  cosine_spearman" in scored.errors
    assert scored.by_state("scored") == {path.stem for path in scored.out.rglob("Drawn*.json")}
    values = [task["score"] for task in scored.results["tasks"] if task["score"] is not None]
    assert scored.results["means"]["tasks"] == pytest.approx(np.mean(values))
    assert scored.output.strip() in (scored.out / "results.md").read_text()
    assert verb("--out", scored.out, *NAME, "--dry-run") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "23 tasks: 21 scored, 1 skipped, 1 here"
    files = {path: path.stat().st_mtime_ns for path in scored.out.rglob("Drawn*.json")}
    assert verb("--out", scored.out, *NAME, "-t", "DrawnSTS,DrawnBoth", "-t", "DrawnZeroShot") == 0
    assert capsys.readouterr().err.count("scored before") == 3
    assert files == {path: path.stat().st_mtime_ns for path in scored.out.rglob("Drawn*.json")}


def test_a_dry_run_writes_nothing(verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb("--out", tmp_path / "out", "-t", "DrawnIT2I,CIRRIT2IRetrieval,DrawnAudio", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines[:2]] == ["here", "reach"] and "image + image,text" in lines[0]
    assert lines[-1] == "3 tasks: 1 here, 1 out of reach, 1 skipped" and not (tmp_path / "out").exists()


def vectors(encoder: Encoder, contents: list[Any]) -> np.ndarray:
    """Of images and texts as items, each encoded alone."""
    made = [Item.of(text=part) if isinstance(part, str) else Item.of(image=ImageInput.from_pil(part)) for part in contents]
    return np.stack([encoder.encode_items([item])[0].vector for item in made])


def test_scores_by_hand(encoder: Encoder, scored: Scored) -> None:
    labels = vectors(encoder, drawn.DrawnZeroShot().get_candidate_labels())
    best = (vectors(encoder, [drawn.draw(n) for n in range(16)]) @ labels.T).argmax(1)
    assert scored["DrawnZeroShot"] == np.mean(best == np.arange(16) % 4) == 0.625
    columns = dict(drawn.DrawnSTS.columns)
    first, second = (vectors(encoder, [columns[name](n) for n in range(12)]) for name in ("sentence1", "sentence2"))
    rho = spearmanr([columns["score"](n) for n in range(12)], (first * second).sum(1)).statistic
    assert scored["DrawnSTS"] == pytest.approx(rho, abs=1e-6) and abs(rho) > 0.1
    assert scored["DrawnBoth"] == pytest.approx((rho + scored["DrawnSTSMore"]) / 2, abs=1e-6)
    right = []
    for n in range(12):
        scores = vectors(encoder, [drawn.draw(n), drawn.draw(n + 1)]) @ vectors(encoder, [drawn.say(n), drawn.say(n + 1)]).T
        right.append((scores.argmax(0) == [0, 1]).all() and (scores.argmax(1) == [0, 1]).all())
    assert scored["DrawnPairs"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1
    task = drawn.DrawnChoice()  # the best of a query's three choices is the right one; these queries may reason
    task.load_data()
    split, right = task.dataset["default"]["test"], []
    documents = dict(zip(split["corpus"]["id"], vectors(encoder, list(split["corpus"]["text"])), strict=True))
    for row in split["queries"]:
        query = Query.of(text=row["text"], image=ImageInput.from_pil(row["image"]), target="text")
        (encoding,) = encoder.encode_queries([query])
        best_id = max(split["top_ranked"][row["id"]], key=lambda id, vector=encoding.vector: float(vector @ documents[id]))
        right.append(split["relevant_docs"][row["id"]][best_id])
    assert scored["DrawnChoice"] == pytest.approx(np.mean(right)) and 0 < np.mean(right) < 1


def test_the_size_of_batches_changes_no_score(encoder: Encoder, scored: Scored, tmp_path: Path) -> None:
    """A wrapper of another model moved EDIR's R@1 from 34.6 to 46.1 by it (mteb's pull request 5247)."""
    names = ["DrawnZeroShot", "DrawnSTS", "DrawnPairs", "DrawnIT2IT", "DrawnChoice"]
    for size in (1, 5):
        run = mteb_run.MtebRun(TraceEncoder.of(encoder, "local/mini"), tmp_path / str(size), batch_size=size)
        for outcome in mteb_run.score(run, mteb_run.choose_tasks([], names, TASKS)):
            assert outcome.score == pytest.approx(scored[outcome.task], abs=1e-6), (size, outcome.task)


def test_one_input_may_hold_several_images_and_text(encoder: Encoder) -> None:
    images = [drawn.draw(1), drawn.draw(2)]
    options: dict[str, Any] = {"task_metadata": drawn.DrawnIT2IT.metadata, "hf_split": "test", "hf_subset": "default"}
    vectors = TraceEncoder.of(encoder).encode([{"image": [images, images[:1]], "text": ["both", ""]}], **options)
    known = [Item((*map(ImageInput.from_pil, images), "both")), Item((ImageInput.from_pil(images[0]),))]
    assert np.abs(vectors - [encoding.vector for encoding in encoder.encode_items(known)]).max() < 1e-6
    with pytest.raises(InputError, match="video"):
        TraceEncoder.of(encoder).encode([{"text": ["a"], "video": ["b"]}], **options)


def reader(*modalities: str, **attributes: Any) -> Planned:
    """An encoder of some modalities, such as sentence-transformers has, that notes what it is asked."""
    encoder = Planned()
    vars(encoder).update({"modalities": modalities or ("text",)} | attributes)
    return encoder


def run_words(words: Planned, out: Path, *names: str) -> list[mteb_run.MtebOutcome]:
    return mteb_run.score(mteb_run.MtebRun(TraceEncoder.of(words), out), mteb_run.choose_tasks([], names, TASKS))


def test_what_a_model_does_not_read_is_skipped_by_name(tmp_path: Path) -> None:
    words = reader()
    outcomes = run_words(words, tmp_path, "DrawnPages", "DrawnI2I", "DrawnTextSTS", "DrawnT2T", "DrawnRerank")
    assert [outcome.state for outcome in outcomes] == ["skipped", "skipped", "scored", "scored", "scored"]
    assert outcomes[0].reason == "it has inputs of image, and the model reads text"
    assert json.loads(next(tmp_path.rglob("model_meta.json")).read_text())["modalities"] == ["text"]
    assert {query.instruction for query in words.asked} == {None}, "a task without a prompt has none"
    assert "image,text" in mteb_run.lacks(drawn.DrawnIT2I(), ("text", "image")), "as with CLIP"
    assert not mteb_run.lacks(drawn.DrawnPairs(), ("text", "image"))


def test_queries_alone_have_the_tasks_prompt_and_route(tmp_path: Path) -> None:
    both = reader("text", "image", "image,text")
    run_words(both, tmp_path, "DrawnZeroShot", "DrawnTextSTS")
    assert not both.asked
    run_words(both, tmp_path, "DrawnI2I")
    assert {(query.instruction, query.target) for query in both.asked} == {("Find an image of the same colour.", "image")}


def test_a_killed_run_goes_on_behind_what_is_scored(
    verb: Verb, scored: Scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process of its own, because it is killed, in the middle of the third of four tasks; no hub answers it."""
    own, words = "DrawnZeroShot,DrawnSlow,DrawnI2T", ["--out", str(tmp_path / "out"), *NAME]
    environment = {name: value for name, value in os.environ.items() if "PROXY" not in name.upper()}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "DRAWN_WAIT": "1"}
    command = [sys.executable, "-m", "traceir", "mteb", "--tasks-from", TASKS, "-t", f"CIRRIT2IRetrieval,{own}", *words]
    with (tmp_path / "errors").open("w") as errors, subprocess.Popen(command, stderr=errors, env=environment) as process:
        while not (first := list(tmp_path.rglob("DrawnZeroShot.json"))) and process.poll() is None:
            time.sleep(0.05)
        process.kill()
    lines = (tmp_path / "errors").read_text().splitlines()
    assert lines[0] == "note: the Hugging Face hub does not answer; tasks can run whose data are on this machine"
    assert first and not any("Traceback" in line or "CIRR" in line for line in lines), lines
    (missing, *_) = json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]
    assert (missing["task"], missing["state"]) == ("CIRRIT2IRetrieval", "failed")
    assert "the hub does not answer" in missing["reason"] and not list(tmp_path.rglob("DrawnSlow.json"))
    before = first[0].stat().st_mtime_ns
    assert verb(*words, "-t", own) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "scored before" in line]
    assert lines == ["1/3  DrawnZeroShot  accuracy 62.50  scored before"] and first[0].stat().st_mtime_ns == before
    for task in json.loads((tmp_path / "out" / "results.json").read_text())["tasks"]:
        assert task["score"] == pytest.approx(scored[task["task"]], abs=1e-6)


def test_files_are_whole_or_count_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    (whole,) = run_words(reader(), tmp_path, "DrawnTextSTS")
    file = next(tmp_path.rglob("DrawnTextSTS.json"))
    content = file.read_text()
    file.write_text(content[:200])
    (again,) = run_words(reader(), tmp_path, "DrawnTextSTS")
    assert again.state == "scored" and again.score == whole.score and "DrawnTextSTS" in caplog.text
    before = {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}
    result = ResultCache(tmp_path).load_results(require_model_meta=False)[0].task_results[0]

    def fails(self: Any, path: Path) -> None:
        path.write_text("{")
        raise OSError("the disk is full")

    monkeypatch.setattr(type(result), "to_disk", fails)
    with pytest.raises(OSError, match="full"):
        mteb_run.MtebResults(tmp_path).save_to_cache(result, TraceEncoder.of(reader()).mteb_model_meta)
    assert before == {path: path.read_bytes() for path in (tmp_path / "results").rglob("*") if path.is_file()}


def test_scores_of_other_templates_or_budgets_are_not_taken_for_these(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [{}, {"prompt_version": "other"}, {"vector_settings": {"max_text_tokens": 8}}, {}]
    states = [run_words(reader(**other), tmp_path, "DrawnTextSTS")[0].state for other in others]
    assert states == ["scored", "scored", "scored", "kept"]


def test_mteb_reads_the_results_and_means_the_same(encoder: Encoder, scored: Scored, monkeypatch: pytest.MonkeyPatch) -> None:
    (model,) = ResultCache(scored.out).load_results(models=["local/mini"]).model_results
    assert model.model_name == "local/mini" and model.model_revision.startswith(f"{encoder.fingerprint}-")
    known = {name: scored[name] for name in scored.by_state("scored")}
    assert {result.task_name: result.get_score() for result in model.task_results} == pytest.approx(known, abs=1e-6)
    names = ["DrawnSTS", "DrawnSTSMore", "DrawnZeroShot", "DrawnI2I", "DrawnI2T"]
    board = mteb.Benchmark(name="Drawn", tasks=mteb_run.choose_tasks([], names, TASKS))
    for task in board.tasks:  # where mteb's leaderboard looks types up
        monkeypatch.setitem(_TASKS_REGISTRY, task.metadata.name, type(task))
    (row,) = ResultCache(scored.out).load_results(models=["local/mini"], tasks=board).get_benchmark_result().to_dict("records")
    ours = mteb_run.means([mteb_run.MtebOutcome(**task) for task in scored.results["tasks"] if task["task"] in names])
    assert (row["Mean (Task)"], row["Mean (TaskType)"]) == pytest.approx((ours["tasks"], ours["types"]), abs=1e-6)


def test_names_that_nobody_knows(verb: Verb, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
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
    assert mteb_run.label("Qwen/Qwen3-VL-Embedding-2B") == "Qwen/Qwen3-VL-Embedding-2B"
    (tmp_path / "my model").mkdir()
    assert mteb_run.label(str(tmp_path / "my model")) == "local/my-model"
