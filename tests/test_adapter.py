"""Adapters: what trains and what does not, save, load and merge, which base is taken; cards and pushing."""

from __future__ import annotations

import functools
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from conftest import image_of, make_queries, random_model
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file

from traceir.adapter import PROJECTOR, WEIGHTS, attach, save_adapter, weights_fingerprint
from traceir.encoder import Encoder
from traceir.errors import InputError, ModelError, TraceError
from traceir.items import Item, Query
from traceir.model import TraceModel, load, merge, save
from traceir.train.card import push, write_card

pytest.importorskip("peft")


class Trained(NamedTuple):
    """Base folder, adapter folder, and the model in memory with the adapter attached."""

    base: Path
    folder: Path
    model: TraceModel
    adapter: Any


def base_model(*, tied: bool) -> TraceModel:
    """A random model whose input and output rows are one matrix, or two."""
    model = random_model(3)  # its configuration says tied, its matrices are not
    if tied:
        model.network.lm_head.weight = model.network.model.language_model.embed_tokens.weight
    return model


def learn(model: TraceModel, adapter: Any, steps: int = 4) -> None:
    """A few steps on a made-up loss that reaches every part: words, images and next-token scores."""
    trainable = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=0.02, weight_decay=0.1)
    prompts = [model.prompt(query) for query in make_queries()[:4]]
    batch = model.processor.collate([model.processor.lay_out(prompt, "a red cube") for prompt in prompts])
    model.network.train()
    for _ in range(steps):
        hidden = model.hidden(batch)
        logits = model.logits(hidden[batch.targets >= 0])
        loss = torch.nn.functional.cross_entropy(logits, batch.targets[batch.targets >= 0]) + hidden.square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.network.eval()


def vectors(model: TraceModel) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Text, image and image+text, as queries by the direct route and as candidates: one unit vector a row."""
    encoder, shown = Encoder(model), image_of(5)
    contents: list[dict[str, Any]] = [{"text": "red cube"}, {"image": shown}, {"text": "make one red", "image": shown}]
    encodings = encoder.encode_queries([Query.of(**content) for content in contents], route="direct")
    encodings += encoder.encode_items([Item.of(**content) for content in contents])
    return np.stack([encoding.vector for encoding in encodings])


def close(first: TraceModel, other: TraceModel) -> bool:
    return bool(((vectors(first) * vectors(other)).sum(axis=1) >= 0.999999).all())


@functools.cache
def learnt(tied: bool) -> tuple[TraceModel, TraceModel, Any]:
    """The base, and the model that has learnt with its adapter attached; no test changes them."""
    base = base_model(tied=tied)
    with tempfile.TemporaryDirectory() as folder:
        model = load(save(base, Path(folder) / "base"))
    adapter = attach(model, rank=4, alpha=8, dropout=0.1, train_projector=True, seed=1)
    learn(model, adapter)
    return base, model, adapter


@pytest.fixture(params=["tied", "untied"])
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Trained:
    before, model, adapter = learnt(request.param == "tied")
    base = save(before, tmp_path / "base")
    return Trained(base, save_adapter(model, adapter, tmp_path / "adapter", str(base)), model, adapter)


@pytest.mark.parametrize("tied", [True, False])
def test_only_lora_projector_and_emb_rows_change(tmp_path: Path, tied: bool) -> None:
    model = load(save(base_model(tied=tied), tmp_path / "base"))
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    frozen, plain = dict(model.network.named_parameters()), vectors(model)
    adapter = attach(model, rank=4, alpha=8, dropout=0.1, train_projector=True, seed=1)
    np.testing.assert_array_equal(vectors(model), plain)  # nothing has been learnt yet, and no dropout is on
    names = [name for name, parameter in adapter.named_parameters() if parameter.requires_grad]
    rest = [name for name in names if ".lora_" not in name and f"{PROJECTOR}.modules_to_save" not in name]
    assert len(rest) == (1 if tied else 2) and all(name.endswith("trainable_tokens_delta.default") for name in rest)
    learn(model, adapter)
    assert all(torch.equal(parameter, before[name]) for name, parameter in frozen.items())
    after = adapter.merge_and_unload().state_dict()
    assert set(after) == set(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    linears = {name for name in before if "language_model.layers" in name and name.endswith("_proj.weight")}
    rows = {name for name in before if name.endswith(("embed_tokens.weight", "lm_head.weight"))}
    assert changed == linears | {name for name in before if PROJECTOR in name} | rows
    for name in rows:
        assert (after[name] != before[name]).any(dim=1).nonzero().flatten().tolist() == [model.processor.emb_id]
    assert (model.network.lm_head.weight is model.network.model.language_model.embed_tokens.weight) == tied


def test_a_bfloat16_base_trains_float32_adapters_and_the_projector_only_if_asked() -> None:
    model = base_model(tied=True)
    model.network.bfloat16()
    adapter = attach(model, rank=2, alpha=4, dropout=0.0, train_projector=False, seed=0)
    trained = {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}
    assert not [name for name in trained if "visual" in name] and {value.dtype for value in trained.values()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        learn(model, adapter, steps=1)
    assert all(torch.isfinite(parameter).all() for parameter in adapter.parameters())
    with pytest.raises(ModelError, match="attached already"):
        attach(model, rank=2, alpha=4, dropout=0.0, train_projector=False, seed=0)
    with pytest.raises(InputError, match="LoRA of rank 0"):
        attach(base_model(tied=True), rank=0, alpha=4, dropout=0.0, train_projector=False, seed=0)


def test_save_load_and_merge_give_the_same_embeddings(trained: Trained, tmp_path: Path) -> None:
    base, folder, model, adapter = trained
    assert ((vectors(load(base)) * vectors(model)).sum(axis=1) < 0.999).all()  # learning has moved each of them
    loaded, merged = load(folder), load(merge(folder, tmp_path / "merged"))
    for other in (loaded, merged):
        assert close(other, model) and not hasattr(other.network, "peft_config")
    assert loaded.fingerprint == load(shutil.copytree(folder, tmp_path / "elsewhere")).fingerprint != load(base).fingerprint
    assert merged.fingerprint == weights_fingerprint(tmp_path / "merged")
    texts = [[encoding.reasoning for encoding in Encoder(side).encode_queries(make_queries())] for side in (loaded, merged)]
    assert texts[0] == texts[1]
    whole = {name: value.clone() for name, value in model.network.state_dict().items()}
    again = save_adapter(model, adapter, tmp_path / "again", str(base), state=whole)
    first, second = (load_file(saved / WEIGHTS) for saved in (folder, again))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_stock_peft_reads_the_folder_and_an_adapter_may_be_a_base(trained: Trained, tmp_path: Path) -> None:
    import peft

    base, folder, model, _ = trained
    stock = load(base)
    peft.PeftModel.from_pretrained(stock.network, str(folder))
    stock.network.eval()
    assert close(stock, model)
    further = load(folder)
    learn(further, adapter := attach(further, rank=2, alpha=4, dropout=0.0, train_projector=False, seed=2))
    assert close(load(save_adapter(further, adapter, tmp_path / "second", str(folder))), further)


@pytest.mark.parametrize("trained", ["tied"], indirect=True)
def test_the_base_is_found_beside_the_adapter_and_another_one_is_refused(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, folder = trained.base, trained.folder
    written = json.loads((folder / "traceir.json").read_text())
    written["base"]["source"] = "../base"
    (folder / "traceir.json").write_text(json.dumps(written))
    monkeypatch.chdir("/")
    assert load(folder).fingerprint == written["fingerprint"]
    shutil.rmtree(base)
    with pytest.raises(ModelError, match=r"not at .*base"):
        load(folder)
    save(random_model(9), base)
    with pytest.raises(ModelError, match="is an adapter over weights"):
        load(folder)


@pytest.mark.parametrize(
    "harm",
    [
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / "traceir.json").unlink(),
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x00" * 100),
        lambda folder: (folder / "adapter_config.json").write_text(
            (folder / "adapter_config.json").read_text().replace('"lora_alpha": 8', '"lora_alpha": 9')
        ),
    ],
    ids=["no weights", "no settings", "damaged weights", "other alpha"],
)
@pytest.mark.parametrize("trained", ["tied"], indirect=True)
def test_a_folder_that_is_not_whole_does_not_load(trained: Trained, harm: Callable[[Path], Any]) -> None:
    harm(trained.folder)
    with pytest.raises(ModelError):
        load(trained.folder)


@pytest.mark.parametrize("trained", ["tied"], indirect=True)
def test_nothing_half_written_and_nothing_overwritten(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder, model, _ = trained
    for source, target, message in ((folder, base, "exists already"), (base, tmp_path / "merged", "nothing to merge")):
        with pytest.raises(ModelError, match=message):
            merge(source, target)
    with pytest.raises(ModelError, match="adapter is attached"):
        save(model, tmp_path / "wrong")
    monkeypatch.setattr(type(model.processor.tokenizer), "save_pretrained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_adapter(model, trained.adapter, tmp_path / "cut", str(base))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


# Cards and pushing


def evaluation(folder: Path, fingerprint: str, row: str = "cirr_task7") -> Path:
    """What `traceir evaluate` leaves, with made-up scores."""
    scores = {"queries": 8, "pool": 20, "metric_k": 5, "hit@5": 0.625, "reasoned": 0.5, "tokens_per_query": 4.5}
    results = {"format": 2, "model": fingerprint, "data": "d" * 64, "split": "test", "limit": None,
               "routes": {"auto": {row: scores}}, "average": {"auto": {"mean": 0.625, "lowest": 0.625}}}  # fmt: skip
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def ready(tmp_path: Path) -> tuple[Path, Path]:
    """A plain checkpoint and the folder of its run, with text that would break Markdown and YAML."""
    checkpoint = save(base_model(tied=True), tmp_path / "checkpoint")
    run, data = tmp_path / "run", tmp_path / "data"
    config = {"data": str(data), "init": "Qwen/Qwen2.5-VL-3B-Instruct", "lora_rank": 128, "note": "```\nend"}
    meta = {"format": 1, "config": config, "data_fingerprint": "d" * 64, "tasks": {"cirr|7": 11}}
    for folder, content in ((data, {"name": "Bad | `name`\n---\n- [x](y): <b>", "seed": 3}), (run, meta)):
        folder.mkdir()
        (folder / "meta.json").write_text(json.dumps(content))
    return checkpoint, run


def test_card_is_valid_and_says_what_the_folder_says(ready: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, run = ready
    assert "nested losses" not in write_card(checkpoint)
    written = json.loads((checkpoint / "traceir.json").read_text())
    (checkpoint / "traceir.json").write_text(json.dumps({**written, "matryoshka_dims": [32, 8]}))
    assert "the first 32, 8 components" in write_card(checkpoint)
    scored = evaluation(tmp_path / "scored", load(checkpoint).fingerprint, row="odd|row\n---\n")
    text = write_card(checkpoint, run=run, evaluations=[scored], repo="somebody/trace-test", licence="apache-2.0")
    assert (checkpoint / "README.md").read_text() == text
    write_card(checkpoint, run=run)  # its own card may be replaced
    assert "None were given" in (checkpoint / "README.md").read_text()
    card = ModelCard(text)
    assert (card.data.library_name, card.data.license) == ("traceir", "apache-2.0")
    assert card.data.base_model == "Qwen/Qwen2.5-VL-3B-Instruct"
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_revision) == ("hit_at_5", 0.625, "d" * 64)
    assert '"lora_rank": 128' in card.text and "62.5" in card.text and "**all rows**" in card.text
    assert "odd\\|row" in card.text and "\\<b\\>" in card.text and str(tmp_path) not in text
    assert card.text.count("\n````") == 2  # the fence is longer than any in the configuration
    with pytest.raises(InputError, match="evaluate this very one"):
        write_card(checkpoint, evaluations=[evaluation(tmp_path / "other", "0123456789abcdef")])
    (checkpoint / "README.md").write_text("mine")
    with pytest.raises(InputError, match="not written by traceir"):
        write_card(checkpoint)


def test_push(ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, _ = ready
    api = MagicMock()
    api.repo_info.return_value.private = True
    api.upload_folder.return_value.commit_url = "https://hub.test/commit/1"
    monkeypatch.setattr("traceir.data.hub.HfApi", lambda **_: api)
    (checkpoint / ".secret").write_text("stays here")
    plan = push(checkpoint, "somebody/trace-test")
    assert "model.safetensors" in plan and "nothing was uploaded" in plan and ".secret" not in plan and not api.method_calls
    assert push(checkpoint, "somebody/trace-test", private=True, dry_run=False).endswith("/commit/1")
    assert [name for name, _, _ in api.method_calls] == ["create_repo", "repo_info", "upload_folder"]
    assert api.create_repo.call_args.kwargs == {"private": True, "exist_ok": True, "repo_type": "model"}
    names = {path.name for path in checkpoint.iterdir()}
    assert set(api.upload_folder.call_args.kwargs["allow_patterns"]) == names - {".secret"}
    api.repo_info.return_value.private = False
    with pytest.raises(TraceError, match="is public"):
        push(checkpoint, "somebody/trace-test", private=True, dry_run=False)
    with pytest.raises(InputError, match="OWNER/NAME"):
        push(checkpoint, "no good name")


def test_push_refuses_what_is_not_whole_or_not_for_others(ready: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, run = ready
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OfflineModeIsEnabled("offline")))
    with pytest.raises(TraceError, match="hf auth login"):
        push(checkpoint, "somebody/trace-test", dry_run=False)
    for name in ("pytorch_model.bin", "extra.PKL", "optimiser.safetensors", "training_args.bin", "run.sh"):
        (checkpoint / name).write_bytes(b"made up")
        with pytest.raises(ModelError, match=re.escape(name)):
            push(checkpoint, "somebody/trace-test", dry_run=True)
        (checkpoint / name).unlink()
    with pytest.raises(ModelError, match="lacks"):
        push(run, "somebody/trace-test")
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ModelError, match="damaged"):
        push(checkpoint, "somebody/trace-test")


@pytest.mark.parametrize("trained", ["tied"], indirect=True)
def test_push_of_an_adapter_needs_a_base_that_others_have(trained: Trained) -> None:
    assert "peft" in (ModelCard(write_card(trained.folder, repo="somebody/adapter")).data.tags or [])
    with pytest.raises(ModelError, match="traceir merge"):
        push(trained.folder, "somebody/adapter")
