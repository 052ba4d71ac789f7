"""Losses by hand, batches by rule, and a run that is killed and goes on to the same weights."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import picture
from safetensors.torch import load_file

from traceir.errors import DataError, TrainError
from traceir.items import Item, Query
from traceir.learn.data import Example, Schedule, TaskData, pixel_store, read_lessons, read_pairs
from traceir.learn.losses import generation_loss, retrieval_loss
from traceir.learn.small import SmallSize, small_model, train_tokenizer
from traceir.learn.train import TrainConfig, objective, rate, train
from traceir.model import TraceModel, TraceSettings

TINY = SmallSize(hidden=32, layers=1, heads=2, inner=48, vision_hidden=32, vision_layers=1, vision_heads=2,
                 vision_inner=32, vocabulary=420)  # fmt: skip


def write_lines(file: Path, records: list[dict[str, object]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hand-made training folder in M-BEIR's layout: 24 picture-to-text pairs and 24 composed ones with reasoning."""
    root = tmp_path_factory.mktemp("data")
    (root / "mbeir_images").mkdir()
    colours = ("red", "green", "blue", "white", "black", "pink")
    queries, pool, labels = [], [], []
    for number in range(48):
        name = f"mbeir_images/{number}.png"
        picture(number).load().save(root / name)
        composed = number >= 24
        text = f"make it {colours[number % 6]} then {colours[number % 5]}" if composed else None
        queries.append(
            {
                "qid": f"8:{number}",
                "query_txt": text,
                "query_img_path": name,
                "query_src_content": None,
                "query_modality": "image,text" if composed else "image",
                "pos_cand_list": [f"8:{number + 100}"],
                "neg_cand_list": [],
                "task_id": 7 if composed else 3,
            }
        )
        pool.append(
            {
                "did": f"8:{number + 100}",
                "txt": None if composed else f"a {colours[number % 6]} thing {number}",
                "img_path": name if composed else None,
                "modality": "image" if composed else "text",
                "src_content": None,
            }
        )
        if composed:
            labels.append({"qid": f"8:{number}", "steps": 2, "z": 1, "reasoning": f"see {number}", "answer": "a thing"})
    write_lines(root / "query/train/mbeir_cirr_train.jsonl", queries)
    write_lines(root / "cand_pool/global/mbeir_union_train_cand_pool.jsonl", pool)
    write_lines(root / "cot/train/mbeir_cirr_train_cot.jsonl", labels)
    write_lines(
        root / "lessons/counting.jsonl",
        [{"img_path": None, "prompt": f"count {n}", "target": " ".join(["one"] * (n % 7 + 1))} for n in range(40)],
    )
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\n"
        "image\ttext\tcirr\t8\tname it\tsay it\nimage,text\timage\tcirr\t8\tchange it\tedit it\n"
    )
    return root


def config(folder: Path, out: Path, **changes: object) -> TrainConfig:
    base = TrainConfig(
        data=str(folder), out=str(out), steps=12, batch=8, family=4, warmup=2, size=TINY, save_every=4, log_every=2
    )
    return replace(base, **changes)


def test_retrieval_loss_by_hand() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    candidate = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    half = math.sqrt(0.5)
    rows = [-math.log(math.exp(2) / (math.exp(2) + math.exp(2 * half))), -math.log(math.exp(2 * half) / (math.exp(2 * half) + 1))]
    assert retrieval_loss(query, candidate, 0.5).item() == pytest.approx(sum(rows) / 2, abs=1e-6)


def test_a_shared_positive_is_not_a_negative() -> None:
    query = torch.eye(3)
    candidate = torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    shared = torch.zeros(3, 3, dtype=torch.bool)
    shared[0, 1] = shared[0, 0] = True
    with_mask = retrieval_loss(query[:1].expand(3, 3), candidate, 0.1, shared)
    without = retrieval_loss(query[:1].expand(3, 3), candidate, 0.1)
    assert with_mask < without
    candidate.requires_grad_()
    rows = retrieval_loss(query, candidate, 0.1, shared)
    rows.backward()
    assert torch.isfinite(candidate.grad).all()


def test_generation_loss_is_cross_entropy_and_zero_without_targets() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert generation_loss(logits, torch.tensor([1, 0])).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert generation_loss(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).item() == 0.0


def test_the_objective_joins_both_terms_and_supervises_the_bypass(model: TraceModel) -> None:
    examples = [
        Example(
            Query.of(text=f"red {n}"),
            "a red cube" if n % 2 else "",
            Item.of(text=f"cube {n}", id=f"1:{n}"),
            frozenset({f"1:{n}"}),
        )
        for n in range(4)
    ]
    draw = np.random.default_rng(0)
    plain = TrainConfig(data="", out="")
    with torch.no_grad():
        both, parts = objective(model, examples, plain, draw)
        gen_only, _ = objective(model, examples, replace(plain, lambda_ret=0.0), draw)
        ret_only, _ = objective(model, examples, replace(plain, lambda_gen=0.0), draw)
    assert both.item() == pytest.approx(gen_only.item() + ret_only.item(), rel=1e-5)
    assert parts["gen"] == pytest.approx(gen_only.item(), rel=1e-5) and parts["gen"] > 0
    simple = [replace(example, completion="") for example in examples]
    with torch.no_grad():
        _, bypass = objective(model, simple, plain, draw)
    assert bypass["gen"] > 0, "<|emb|> itself is a target of simple samples"


class Numbered(TaskData):
    def example(self, number: int, draw: np.random.Generator) -> Example:
        return Example(Query.of(text=f"{self.name} {number}"), "", None, frozenset())


def test_the_schedule_keeps_shares_families_and_epochs() -> None:
    tasks = [Numbered("a", range(16)), Numbered("b", range(8))]
    schedule = Schedule(tasks, [3.0, 1.0], batch=8, family=4, steps=40, seed=1)
    names = [schedule.task(step).name for step in range(40)]
    assert names.count("a") == 30 and names.count("b") == 10
    rows = [[int(e.query.text.split()[1]) for e in schedule.examples(step)] for step in range(40) if names[step] == "a"]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert sorted(first + second) == list(range(16)), "two batches of 8 make one epoch of 16"
    for batch in rows:
        for start in (0, 4):
            family = batch[start : start + 4]
            assert family == list(range(family[0], family[0] + 4)) and family[0] % 4 == 0
    again = Schedule(tasks, [3.0, 1.0], batch=8, family=4, steps=40, seed=1)
    assert [e.query for e in again.examples(17)] == [e.query for e in schedule.examples(17)], "a step needs no history"


def test_schedule_refuses_what_cannot_be() -> None:
    with pytest.raises(TrainError, match="multiple of family"):
        Schedule([Numbered("a", range(9))], [1.0], batch=9, family=2, steps=1, seed=0)
    with pytest.raises(TrainError, match="weights"):
        Schedule([Numbered("a", range(9))], [0.0], batch=8, family=2, steps=1, seed=0)


def test_reading_joins_labels_and_drops_them_for_the_baseline(folder: Path) -> None:
    taught = {task.name: task for task in read_pairs(folder, reasoning=True)}
    bare = {task.name: task for task in read_pairs(folder, reasoning=False)}
    assert set(taught) == {"cirr_task3", "cirr_task7"} == set(bare)
    draw = np.random.default_rng(0)
    example = taught["cirr_task7"].example(0, draw)
    assert example.completion == "see 24; a thing" and example.candidate is not None
    assert example.query.instruction in ("Change it.", "Edit it.") and example.query.target == "image"
    assert bare["cirr_task7"].example(0, draw).completion == ""
    (counting,) = read_lessons(folder)
    assert counting.name == "lessons_counting"
    lengths = [len(lesson[2]) for lesson in counting.lines]
    assert lengths == sorted(lengths), "one window of lessons is sorted by length"


def test_a_pixel_store_is_completed_without_what_it_holds_already(folder: Path, tmp_path: Path) -> None:
    model = small_model(train_tokenizer(["a thing"], 300), TINY, TraceSettings(prompt_version="brief-1"), 0)
    names = []
    for number in (1, 2):
        names.append(f"{number}.png")
        picture(number).load().save(tmp_path / names[-1])
    first = pixel_store(tmp_path, tmp_path / "cache", model.processor, names[:1])[str(tmp_path / "1.png")].copy()
    (tmp_path / "1.png").unlink()
    store = pixel_store(tmp_path, tmp_path / "cache", model.processor, names[1:])
    assert len(store) == 2 and (store[str(tmp_path / "1.png")] == first).all()
    assert (store[str(tmp_path / "2.png")] != first).any()
    with pytest.raises(DataError, match=r"3\.png"):
        pixel_store(tmp_path, tmp_path / "cache", model.processor, ["3.png"])


def test_rate_warms_up_holds_and_falls(folder: Path) -> None:
    plan = config(folder, folder, steps=100, warmup=10, decay=0.2)
    assert rate(0, plan) == pytest.approx(0.1) and rate(50, plan) == 1.0
    assert rate(90, plan) == pytest.approx(0.5) and rate(99, plan) == pytest.approx(0.05)


def test_killed_and_resumed_equals_uninterrupted(folder: Path, tmp_path: Path) -> None:
    whole = train(config(folder, tmp_path / "whole"))
    broken = config(folder, tmp_path / "broken")
    script = "import json,sys\nfrom dataclasses import replace\nfrom traceir.learn.train import *\n" \
        "from traceir.learn.small import SmallSize\nplan=json.loads(sys.argv[1])\nplan['size']=SmallSize(**plan['size'])\n" \
        "plan['keep']=tuple(plan['keep'])\ntrain(TrainConfig(**plan))\n"  # fmt: skip
    child = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(asdict(broken))], env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list((tmp_path / "broken/steps").glob("00*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    resumed = train(broken)
    first, second = load_file(whole / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken/log.jsonl").read_text().splitlines()]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert train(broken) == resumed, "a finished run is left alone"


def test_a_changed_configuration_is_refused(folder: Path, tmp_path: Path) -> None:
    train(config(folder, tmp_path / "run", steps=2))
    with pytest.raises(TrainError, match="learning_rate"):
        train(config(folder, tmp_path / "run", steps=2, learning_rate=1.0))
    with pytest.raises(TrainError, match="nosuch_task9"):
        train(config(folder, tmp_path / "other", weights={"nosuch_task9": 1.0}))


def test_a_loss_that_is_not_finite_stops_with_the_batch_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="8:"):
        train(config(folder, tmp_path / "run", temperature=float("nan")))


def test_lessons_then_pairs_share_one_tokenizer(folder: Path, tmp_path: Path) -> None:
    first = train(config(folder, tmp_path / "lessons", teach="lessons", steps=3))
    second = train(config(folder, tmp_path / "pairs", init=str(first), steps=3))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
