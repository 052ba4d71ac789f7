"""The command line: verbs end to end on a small random model, streams and exit codes, presets and their overrides."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import both_routes, image_of, make_queries, random_model

from traceir import items
from traceir.batch import IGNORE
from traceir.checkpoint import bundled_model
from traceir.cli import main as cli
from traceir.cli import search_verbs
from traceir.data.settings import known_keys, override
from traceir.encoder import Encoder
from traceir.errors import InputError, ModelError
from traceir.explain import describe, explain
from traceir.index.filters import matches
from traceir.index.store import StoredType
from traceir.items import Encoding, Item, Query
from traceir.lab.gallery import cost
from traceir.lab.mini_presets import PRESETS, resolve, stages_before
from traceir.minibeir import rows
from traceir.model import TraceModel, load, save
from traceir.prompts import EMB, normalise, render_candidate, render_query
from traceir.train.small import SmallSize
from traceir.train.train import TrainConfig

SMALL = "hidden=48 layers=1 heads=4 inner=64 vision_hidden=32 vision_layers=1 vision_heads=2 vision_inner=32 vocabulary=400"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(both_routes(random_model(), make_queries()), tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> TraceModel:
    return load(checkpoint)


@pytest.fixture
def gallery(tmp_path: Path) -> Path:
    """Two images, a text, lines with fields; one file that is no image."""
    folder = tmp_path / "things"
    folder.mkdir()
    for number in range(2):
        image_of(number).load().save(folder / f"{number}.png")
    (folder / "note.txt").write_text("a green cone")
    (folder / "broken.png").write_bytes(b"no picture")
    lines = [{"id": f"line{n}", "text": f"cube {n}", "year": 1990 + n, "code": str(1990 + n)} for n in range(3)]
    (folder / "more.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


Call = Callable[..., Any]


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs a command, which must end with this code, and returns what it printed as `out` and `err`."""

    def called(*arguments: object, code: int = 0) -> Any:
        capsys.readouterr()
        ended, printed = run(*arguments), capsys.readouterr()
        assert ended == code, printed.err
        return printed

    return called


def test_help_loads_nothing_heavy() -> None:
    script = """
import sys
from traceir.cli.main import main
for words in ([], ["index", "add"], ["search"], ["explain"], ["evaluate"], ["minibeir", "build"], ["train"], ["demo"]):
    try:
        main([*words, "--help"])
    except SystemExit as done:
        assert done.code == 0, words
print("heavy:", sorted({"torch", "numpy", "PIL", "transformers"} & set(sys.modules)))
from traceir.cli import cot_verbs, index_verbs, learn_verbs, search_verbs
extras = {"datasets", "duckdb", "openai", "pandas", "pyarrow", "pydantic", "pymilvus", "ray", "starlette", "uvicorn"}
print("with all verbs:", sorted({"faiss", "torch", *extras} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("heavy: []\nwith all verbs: []\n") and "--preset" in done.stdout and "optimise" not in done.stdout


def test_the_choices_of_the_parser_are_those_of_the_code() -> None:
    table = json.loads((Path(cli.__file__).with_name("verbs.json")).read_text(encoding="utf-8"))
    choices: dict[str, list[tuple[str, ...]]] = {}
    for options in [*table["shared"].values(), *(verb["options"] for verb in table["verbs"].values())]:
        for option in (option for option in options if isinstance(option, dict) and "choices" in option):
            choices.setdefault(option["names"], []).append(tuple(option["choices"]))
    assert {*choices["--route"]} == {items.ROUTES} and {*choices["--scale"]} == {rows.SCALES}
    assert {*choices["--store"]} == {get_args(StoredType)} and choices["--preset"] == [tuple(PRESETS)]
    assert set(*choices["--modality"]) == set(items.MODALITIES)
    for name, verb in table["verbs"].items():
        module, _, function = verb["run"].partition(".")
        assert callable(getattr(importlib.import_module(f"traceir.cli.{module}"), function)), name


def test_former_names_are_accepted_with_a_notice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("index", "optimise", "--index", tmp_path / "none") == 2
    notice, error = capsys.readouterr().err.splitlines()
    assert notice == "note: `index optimise` is now called `index build-ann`" and "none" in error
    with pytest.raises(SystemExit):
        run("serve", "--help")
    shown = capsys.readouterr().out
    assert "--images DIR" in shown and "--pictures" not in shown and "SUPPRESS" not in shown
    args = cli.build_parser().parse_args(["serve", "--index", "i", "--pictures", "a", "--images", "b", "--pictures", "c"])
    assert args.images == [Path("a"), Path("b"), Path("c")]
    assert capsys.readouterr().err.splitlines() == ["note: --pictures is now called --images"] * 2
    with pytest.raises(SystemExit):
        run("serve", "--help")
    shown = capsys.readouterr().out
    assert "--images" in shown and "--pictures" not in shown and "SUPPRESS" not in shown


def test_the_bundled_model_is_named_by_the_environment_or_lies_in_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traceir.checkpoint.__file__", str(tmp_path / "checkpoint.py"))
    monkeypatch.delenv("TRACEIR_MODEL", raising=False)
    with pytest.raises(ModelError, match="--model"):
        bundled_model()
    (tmp_path / "models" / "mini").mkdir(parents=True)
    (tmp_path / "models" / "mini" / "config.json").write_text("{}")
    assert bundled_model() == tmp_path / "models" / "mini"
    monkeypatch.setenv("TRACEIR_MODEL", "/elsewhere")
    assert bundled_model() == Path("/elsewhere")


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("two\nlines"), 2, "two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("odd"), 1, "ZeroDivisionError: odd (unexpected; run it again with -v for the traceback)"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    error: BaseException, code: int, message: str, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setattr("traceir.cli.index_verbs.open_index", Mock(side_effect=error))
    assert call("index", "info", "--index", "x", code=code) == ("", f"traceir: error: {message}\n")
    assert "Traceback" in call("index", "info", "--index", "x", "-v", code=code).err


def test_an_index_is_filled_described_copied_and_pruned(gallery: Path, tmp_path: Path, checkpoint: Path, call: Call) -> None:
    index, copy = tmp_path / "index", tmp_path / "copy"
    fill = ("index", "add", gallery, gallery / "more.jsonl", "--index", index, "--model", checkpoint, "--batch", 3)
    seen = call(*fill, code=1)
    assert seen.out.startswith("added 6, updated 0, skipped 0 already there, failed 1; 6 items") and "broken.png" in seen.err
    (gallery / "broken.png").unlink()
    assert call(*fill).out.startswith("added 0, updated 0, skipped 6")
    assert call("index", "copy", index, copy).out.startswith("copied 6, skipped 0 already there; 6")
    info = json.loads(call("index", "info", "--index", copy, "--json").out)
    assert info["count"] == 6 and info["counts"] == {"image": 2, "text": 4} and info["cells"] == 0
    assert "IVF lists" in call("index", "build-ann", "--index", index).out
    assert "6 (2 image, 4 text)" in call("index", "info", "--index", index).out
    assert call("index", "rm", "--index", index, "note.txt", "line1").out == "removed 2\n"
    seen = call("index", "rm", "--index", index, "note.txt", code=1)
    assert seen.out == "removed 0\n" and "note.txt" in seen.err


def test_a_search_prints_what_the_encoder_and_the_index_say(
    gallery: Path, tmp_path: Path, checkpoint: Path, loaded: TraceModel, call: Call
) -> None:
    index, model = ("--index", tmp_path / "index"), ("--model", checkpoint)
    call("index", "add", gallery, gallery / "more.jsonl", *index, *model, code=1)
    words = ("search", *index, *model, "--image", gallery / "0.png", "--text", "then a ball", "-k", 2)
    answer = json.loads(call(*words, "--modality", "text", "--route", "reason", "--json").out)
    query = Query.of(text="then a ball", image=image_of(0), target="text")
    (encoding,) = Encoder(loaded).encode_queries([query], route="reason")
    assert answer["route"] == "reason" and answer["reasoning"] == encoding.reasoning and answer["tokens"] == encoding.tokens > 0
    assert [hit["rank"] for hit in answer["hits"]] == [1, 2] and {hit["modality"] for hit in answer["hits"]} == {"text"}
    assert answer["hits"][0]["score"] >= answer["hits"][1]["score"]

    printed = call(*words, "--route", "direct", "--modality", "image").out.splitlines()
    assert printed[0].startswith("route      direct") and len(printed) == 3
    assert {"0.png", "1.png"} == {line.split()[2] for line in printed[1:]}
    assert [hit["id"] for hit in json.loads(call(*words, "--where", "year=1991", "--json").out)["hits"]] == ["line1"]
    assert "build" in call(*words, "--approximate", code=2).err
    for order in (["a red cube", *index], [*index, "a", "red", "cube"], [*index, "--route", "auto", "--text", "a red cube"]):
        assert len(hits := call("search", *model, "-k", 3, *order).out.splitlines()[1:]) == 3
        assert hits == call("search", "a red cube", *index, *model, "-k", 3).out.splitlines()[1:]
    for verb in (["search", *index], ["explain"], ["explain", "--candidate"]):
        assert "the text is given twice" in call(*verb, "a red cube", "--text", "a ball", *model, code=2).err


def test_wrong_input_is_refused_before_a_model_is_loaded(
    gallery: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.setitem(sys.modules, "traceir.library", None)
    index, phone = tmp_path / "index", tmp_path / "phone"
    phone.mkdir()
    for name in ("1.psd", "2.PSD", "sound.m4a"):
        (phone / name).write_bytes(b"x")
    for words, why in (
        (("search", "--index", index), "nothing to search with"),
        (("search", "", "--index", index), "nothing to search with"),
        (("search", "--index", index, "--text", "a", "--where", "year"), "FIELD=VALUE"),
        (("search", "--index", index, "--text", "a", "--mode", "keyword", "--cutoff", "0.1"), "a cut-off judges vectors"),
        (("search", "--index", index, "--text", "a", "--minus-image", "nothere.png"), "nothere.png does not exist"),
        (("index", "add", phone, phone / "sound.m4a", "--index", index), "convert images"),
        (("evaluate", "--data", gallery, "--out", tmp_path / "out", "--route", "auto,fast"), "'fast'"),
        (("explain", "--candidate", "--text", "a", "--modality", "text"), "--candidate"),
        (("train", "--preset", "emoji", "--data", gallery, "--init", "randon"), "there is no folder 'randon'"),
    ):
        assert why in call(*words, code=2).err, words
    assert not index.exists()
    with pytest.raises(SystemExit, match="2"):
        run("search", "--index", index, "--text", "a", "-k", 0)


@pytest.mark.parametrize(
    "line",
    [
        "evaluate --data {} --out {}/out",
        "unseen --data {} --out {}/out --dry-run",
        "faithfulness --data {} --out {}/out",
        "minibeir sheet --data {} --out {}/sheet.png",
        "train --preset emoji --data {} --out {}/out",
        "reasoning build --data {} --out {}/out --dry-run",
        "reasoning review {} --agreement",
        "compare a={} b={}",
        "push {} --repo a/b --dry-run",
        "merge {} --out {}/out",
    ],
)
def test_an_empty_folder_is_an_error_of_every_verb(line: str, tmp_path: Path, call: Call) -> None:
    (tmp_path / "empty").mkdir()
    seen = call(*line.replace("{}", str(tmp_path / "empty")).split(), code=2)
    assert str(tmp_path / "empty") in seen.err and "unexpected" not in seen.err and seen.out == ""


def test_every_line_has_an_outcome_and_no_text_can_steer_the_terminal(
    tmp_path: Path, checkpoint: Path, loaded: TraceModel, call: Call, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [{"id": "a", "text": "red\x1b[31m\ncube", "tags": ["red", "blue"]}, {"id": "b", "title": "a door"},
             {"id": "c", "title": "a cup"}, {"id": "a", "text": "again"}, {"id": "d", "text": "kept", "image": "none.png"},
             {"id": "e"}, {"id": "f", "text": "red " * 2000}, {"id": "g", "text": "red " * 3000}]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--index", tmp_path / "i", "--model", checkpoint)
    seen = call("index", "add", tmp_path / "t.jsonl", *words, code=1)
    assert seen.out.startswith("added 6, updated 0, skipped 0 already there, failed 2; 6 items")
    printed = seen.err.replace(f"{tmp_path}/", "").splitlines()
    limit = loaded.settings.max_text_tokens
    for start, rest in (
        ("note: t.jsonl:2 and 1 more", "it has no `text`: its `title` was taken"),
        ("note: t.jsonl:5", "kept with its text alone"),
        ("note: t.jsonl:7 and 1 more", f"its text is longer than the {limit} tokens"),
        ("failed: t.jsonl:4", "given twice, by t.jsonl:1 and t.jsonl:4"),
        ("failed: t.jsonl:6", "is empty"),
    ):
        assert sum(line.startswith(start) and rest in line for line in printed) == 1, start
    assert len(printed) == 5
    for value, ids in (("red", ["a"]), ("green", []), ("null", ["b", "c", "d", "f", "g"])):
        hits = json.loads(call("search", "x", *words, "--route", "direct", "--where", f"tags={value}", "--json").out)["hits"]
        assert sorted(hit["id"] for hit in hits) == ids
        assert all(hit["fields"]["tags"] == ["red", "blue"] for hit in hits if hit["id"] == "a")
    (hit,) = call("search", "red " * 2000, *words, "--route", "direct", "--where", "tags=red").out.splitlines()[1:]
    assert hit.endswith("red [31m cube") and f"{limit} tokens" in caplog.text and "(1 of 1)" in caplog.text


SLIPS = {
    "serch x": "search", "add photos": "index add", "delete a": "index rm", "index ad x": "add", "reasoning biuld": "build",
    "search x --indx i": "--index", "search x --index i --aproximate": "--approximate",
    "search x --index i --modality picture": "image", "search x --index i --modality text,image": "image,text",
    "search x --index i --route Reson": "reason", "train --preset minni": "mini", "report scorebord a": "scoreboard",
}  # fmt: skip


@pytest.mark.parametrize("line", SLIPS)
def test_a_slip_of_the_pen_is_answered_with_the_nearest_name(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*line.split())
    assert f"did you mean '{SLIPS[line]}'?" in capsys.readouterr().err


def test_what_ended_a_reasoning_is_told() -> None:
    vector = np.ones(1, dtype=np.float32)
    for ended, words in (
        ("turn", "4 tokens, ended its turn without <|emb|>"),
        ("budget", "4 tokens, cut off at the budget before <|emb|>"),
        (None, "4 tokens, ended without <|emb|>"),
    ):
        assert cost(Encoding(vector, "reason", "a b c d", 4, 0.1, True, ended=ended)).endswith(words)
    assert cost(Encoding(vector, "reason", "a", 1, 0.1, False)).endswith("1 token")


def test_conditions_match_text_and_what_it_reads_as() -> None:
    both, none = search_verbs.parse_where(["year=1991", "code=a=b"]), search_verbs.parse_where(["gone=null"])
    for where, fields, expected in (
        (both, {"year": 1991, "code": "a=b"}, True), (both, {"year": "1991", "code": "a=b"}, True),
        (both, {"year": 1992, "code": "a=b"}, False), (both, {"year": 1991, "code": "a"}, False),
        (none, {}, True), (none, {"gone": 0}, False), (search_verbs.parse_where([]), {}, True),
    ):  # fmt: skip
        assert matches(where, "x", "text", fields) is expected
    for text in ("NaN", "-Infinity", "1e999", "9" * 20, "9" * 5000, "[1]", "{"):  # these read as no value
        where = search_verbs.parse_where([f"code={text}"])
        assert matches(where, "x", "text", {"code": text}) and not matches(where, "x", "text", {})
    with pytest.raises(InputError, match="5000 conditions in all; give at most 256"):
        search_verbs.parse_where(["a=1"] * 5000)


def test_a_number_and_a_colon_before_a_term_are_its_weight() -> None:
    for text, term in (
        ("beach", (1, "beach")), ("0.5:beach", (0.5, "beach")), (".5:a:b", (0.5, "a:b")), ("1:16:9", (1, "16:9")),
        ("note: 5", (1, "note: 5")), ("5:", (1, "5:")), ("-1:a", (1, "-1:a")), ("2:\n", (2, "\n")),
    ):  # fmt: skip
        assert search_verbs.parse_term(text) == term
    with pytest.raises(InputError, match="weight 16, more than 10; if that is no weight, write 1:16:9"):
        search_verbs.parse_term("16:9")


def test_a_search_is_moved_folded_sorted_and_paged(tmp_path: Path, checkpoint: Path, loaded: TraceModel, call: Call) -> None:
    lines = [
        {"id": f"t{n}", "text": ["a red cube", "a red cube", "a blue cone"][n % 3], "date": f"2024-0{n + 1}"} for n in range(6)
    ]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    where = ("--index", tmp_path / "i", "--model", checkpoint)
    call("index", "add", tmp_path / "t.jsonl", *where)
    words = call("search", "red cube", "--mode", "keyword", "--fold", "--sort", "-date", *where[:2]).out.splitlines()
    assert words[0].startswith("mode       keyword (") and len(words) == 2 and words[1].endswith("a red cube  (+3 like it)")
    both = call(
        "search", "red cube", "--mode", "hybrid", "--where", "date>=2024-03", "--where", "not id=t5", *where
    ).out.splitlines()
    assert sorted(line.split()[2] for line in both if re.match(" *[0-9]", line)) == ["t2", "t3", "t4"]
    assert any("(vector " in line and ", keyword " in line for line in both)
    asked = ("search", "a red cube", "-k", 4, "--json", "--minus", "0.5:a cone", "--plus", "a ball", *where)
    pages = [json.loads(call(*asked).out)]
    pages.append(json.loads(call(*asked, "--after", pages[0]["next"]).out))
    assert sorted(hit["id"] for page in pages for hit in page["hits"]) == [f"t{n}" for n in range(6)]
    assert [hit["rank"] for page in pages for hit in page["hits"]] == [1, 2, 3, 4, 5, 6] and pages[1]["next"] is None
    moved = pages[0]["hits"][0]
    assert moved["scores"] == {"vector": moved["score"]} and moved["similar"] == []
    assert moved["score"] != json.loads(call("search", "a red cube", "--json", *where).out)["hits"][0]["score"]
    with pytest.raises(SystemExit, match="2"):
        run("search", "--fold", "quick", *where)


def test_an_explanation_shows_what_is_supervised_and_read(loaded: TraceModel, checkpoint: Path, call: Call) -> None:
    query = Query.of(text="then make one red", image=image_of(3), instruction="find it", target="image")
    prompt = render_query(query, "brief-1")
    shown = explain(loaded, prompt, "red cube")
    layout = loaded.processor.lay_out(prompt, "red cube")
    assert [token.target is not None for token in shown.tokens] == (layout.targets != IGNORE).tolist()
    taught = [token.target for token in shown.tokens if token.target is not None]
    assert taught[-1] == EMB and "".join(taught[:-1]).split() == ["red", "cube"]
    assert [token.position for token in shown.tokens if token.pooled] == [shown.pooling_index] == [len(shown.tokens) - 1]
    (encoding,) = Encoder(loaded).encode_queries([query])
    assert shown.emb_probability == pytest.approx(encoding.emb_probability, abs=1e-5) and shown.route == encoding.route
    assert shown.cut == 0 and "-> '<|emb|>'" in describe(shown) and "<|image_pad|> x 9" in describe(shown)

    candidate = explain(loaded, render_candidate(Item.of(text="red"), "brief-1"))
    assert candidate.route == "direct" and all(token.target is None for token in candidate.tokens)
    with pytest.raises(InputError, match="never reason"):
        explain(loaded, render_candidate(Item.of(text="red"), "brief-1"), "red")
    printed = call("explain", "--model", checkpoint, "--text", "red " * 2000, "--modality", "text").out
    cut = int(printed.partition("text tokens cut: ")[2].split()[0])
    assert cut == len(loaded.processor.plain_ids(normalise("red " * 2000))) - loaded.processor.max_text_tokens > 0


def test_evaluate_prints_a_table_and_writes_the_results(tmp_path: Path, folder: Path, checkpoint: Path, call: Call) -> None:
    out = tmp_path / "out"
    words = ("evaluate", "--data", folder, "--model", checkpoint, "--out", out, "--rows", "cirr_task7", "--limit", 3)
    printed = call(*words, "--route", "direct", "--route", "auto,reason")
    results = json.loads((out / "results.json").read_text())
    assert list(results["routes"]) == ["direct", "auto", "reason"] and "results.json" in printed.err
    assert printed.out.count("| cirr_task7 |") == 3
    assert {row["cirr_task7"]["queries"] for row in results["routes"].values()} == {3}
    assert "cirr_task7" in call(*words, "--dry-run").out
    assert "did you mean 'cirr_task7'" in call(*words[:-4], "--rows", "cirr_tsk7", code=2).err


def test_the_benchmark_verbs_pass_their_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call) -> None:
    build = Mock(return_value="built")
    monkeypatch.setattr("traceir.cli.learn_verbs.minibeir.build", build)
    assert call("minibeir", "build", "--out", tmp_path, "--scale", "full", "--seed", 3, "--workers", 2).out == "built\n"
    build.assert_called_once_with(tmp_path, scale="full", seed=3, workers=2)


def test_train_runs_a_preset_with_overrides(tmp_path: Path, folder: Path, call: Call) -> None:
    settings = [f"size.{size}" for size in SMALL.split()] + ["steps=2", "batch=2", "group=1", "mixed_precision=false"]
    words = ["train", "--preset", "emoji", "--init", "random", "--data", folder, "--out", tmp_path / "run"]
    words += [word for setting in settings for word in ("--set", setting)]
    assert Path(call(*words).out.strip()) == tmp_path / "run" / "checkpoint"
    meta = json.loads((tmp_path / "run" / "meta.json").read_text())
    assert meta["config"]["steps"] == 2 and meta["config"]["size"]["hidden"] == 48 and meta["config"]["temperature"] == 0.05
    assert load(tmp_path / "run" / "checkpoint").width == 48
    call(*words, "--resume-from", tmp_path, code=2)


def test_overrides_take_their_type_from_the_field() -> None:
    config = TrainConfig(data="d", out="o")
    words = "steps=7 learning_rate=3e-4 precheck=False pooling_position=at_token report_to=tensorboard,wandb keep=10,20 init=a=b"
    changed = override(config, [*words.split(), "size.hidden=128", "weights.cirr_task7=4"])
    assert (changed.steps, changed.learning_rate, changed.precheck, changed.keep) == (7, 3e-4, False, (10, 20))
    assert changed.pooling_position == "at_token" and changed.report_to == ("tensorboard", "wandb")
    assert changed.size == SmallSize(hidden=128) and changed.weights == {"cirr_task7": 4.0} and changed.init == "a=b"
    assert config == TrainConfig(data="d", out="o")


WRONG_OVERRIDES = {
    "stepz=3": "stepz.*did you mean 'steps'.*weights.NAME.*size.hidden", "size.hiden=3": "did you mean 'hidden'",
    "size=3": "size.hidden", "steps.a=3": "steps has no parts", "weights=3": "weights.NAME", "steps=3.5": "whole number",
    "temperature=nan": "finite", "precheck=1": "true or false", "cot=most": "both, reasoning, answer", "steps": "key=value",
}  # fmt: skip


@pytest.mark.parametrize("setting", WRONG_OVERRIDES)
def test_a_wrong_override_names_the_remedy(setting: str) -> None:
    with pytest.raises(InputError, match=WRONG_OVERRIDES[setting]):
        override(TrainConfig(data="d", out="o"), [setting])


def test_presets_are_whole_and_check_where_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, preset in PRESETS.items():
        config = preset()
        assert config.batch % config.group == 0 and "size.hidden" in known_keys(config), name
        with pytest.raises(InputError, match="does not exist"):
            resolve(name)
    with pytest.raises(InputError, match="did you mean 'mini-words'"):
        resolve("mini-wrds")
    with pytest.raises(InputError, match="train --preset mini-lessons first"):
        resolve("mini", data=str(tmp_path))
    assert stages_before("mini") == ["mini-naming", "mini-words", "mini-lessons"] and stages_before("emoji") == []
    finished = tmp_path / "out/runs/mini-words/checkpoint"
    finished.mkdir(parents=True)
    (finished / "traceir.json").write_text("{}")
    assert stages_before("mini-direct") == ["mini-lessons"] and stages_before("mini-lessons") == []
    mini, direct = (resolve(name, data=str(tmp_path), init="random", out="o") for name in ("mini", "mini-direct"))
    assert mini.cot == "both" and direct.cot == "none" and mini == override(direct, ["cot=both"])
    assert resolve("qwen2.5-vl-7b", data=str(tmp_path)).init.startswith("Qwen/"), "a hub id needs no folder"
    assert mini.cache == "" and PRESETS["mini"]().cache != ""  # pixels of other data are not mixed in
