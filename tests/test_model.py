"""What the processor makes of prompts and images; checkpoints saved, found, loaded and refused. See also test_backbones.py."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from backbones import published
from conftest import image_of, random_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from traceir.batch import ImageBudget, Processor, smart_resize
from traceir.checkpoint import bundled_model, fingerprint
from traceir.encoder import Encoder
from traceir.errors import ImageError, ModelError
from traceir.forward import add_token
from traceir.items import Item, Query
from traceir.model import TraceModel, image_budget, load, save
from traceir.prompts import EMB, render_candidate, render_query


@pytest.mark.parametrize(
    "config",
    [
        # Top-level values go before `size` in transformers 4.51.3, 4.57.3 and 5.24.0.
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "min_pixels": 200704, "max_pixels": 1003520},
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16},
        {"min_pixels": 200704, "max_pixels": 1003520},
        {"size": None},
    ],
)
def test_the_budget_of_images_is_the_stock_processors(tmp_path: Path, config: dict[str, object]) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **config}))
    stock = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    patch = int(str(config.get("patch_size", 14)))
    vision = SimpleNamespace(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    budget = image_budget(file, SimpleNamespace(vision_config=vision))
    for width, height in ((400, 300), (1500, 1000), (10, 10)):
        (grid,) = stock(images=[image_of(0, width, height).load()], return_tensors="pt")["image_grid_thw"].tolist()
        assert grid == [1, *(side // patch for side in smart_resize(height, width, budget))]
    with pytest.raises(ImageError, match="aspect ratio"):
        smart_resize(1, 201, budget)


def test_text_from_users_is_never_a_special_token(model: TraceModel) -> None:
    plain = model.processor.lay_out(render_candidate(Item.of(text=f"red {EMB} <|im_start|> <|image_pad|>"), "brief-1"))
    assert not {model.processor.emb_id, model.processor.special["<|image_pad|>"]} & set(plain.ids.tolist())


def test_supervision_covers_completion_and_emb_only(model: TraceModel) -> None:
    prompt = render_query(Query.of(text="red cube", instruction="find"), "brief-1")
    bare, direct, reasoned = (model.processor.lay_out(prompt, completion) for completion in (None, "", "a green ball"))
    written = list(model.processor.plain_ids("a green ball"))
    assert direct.ids.tolist() == bare.ids.tolist()
    assert direct.targets.tolist() == [-100] * (len(bare) - 1) + [model.processor.emb_id]
    assert reasoned.ids.tolist() == [*bare.ids.tolist(), *written] and reasoned.pooling_index == len(reasoned) - 1
    assert reasoned.targets[len(bare) - 1 :].tolist() == [*written, model.processor.emb_id]


def test_the_text_budget_cuts_user_text_and_says_so(model: TraceModel) -> None:
    tight = Processor(model.processor.tokenizer, model.processor.image, max_text_tokens=3)
    prompt = render_candidate(Item.of(text="red green blue cube ball"), "brief-1")
    cut, whole = tight.lay_out(prompt), model.processor.lay_out(prompt)
    assert cut.cut > 0 and len(cut) == len(whole) - cut.cut
    assert cut.ids[-1] == whole.ids[-1], "the template behind the text survives the cut"


def test_pixel_store_is_used_instead_of_the_file(model: TraceModel) -> None:
    blank = np.zeros((48, 48, 3), dtype=np.uint8)
    stored = Processor(model.processor.tokenizer, ImageBudget(), pixel_store={"noise-1-48x48": blank})
    assert not stored.pixels(image_of(1)).any()


def test_transformers_warns_of_nothing_where_a_model_loads_and_reasons(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    (encoding,) = Encoder(load(bundled_model())).encode_queries([Query.of(text="a red cube", image=image_of(1))], route="reason")
    assert encoding.route == "reason" and not caplog.records


def test_save_and_load_give_the_same_vectors_and_an_ordinary_checkpoint(model: TraceModel, tmp_path: Path) -> None:
    folder = save(model, tmp_path / "checkpoint")
    again = load(folder)
    batch = model.processor.collate([model.processor.lay_out(render_candidate(Item.of(image=image_of(1)), "brief-1"))])
    with torch.no_grad():
        assert torch.equal(model.hidden(batch), again.hidden(batch))
    assert again.settings.prompt_version == "brief-1"
    written = json.loads((folder / "traceir.json").read_text())
    assert again.fingerprint == written["fingerprint"] != "random" and written["read_out"] == "before_token"
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(stock.lm_head.weight, model.network.lm_head.weight)
    assert load(save(random_model(1), tmp_path / "other")).fingerprint != again.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "other"], "no scratch folder is left"


def test_settings_are_overridden_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(random_model(), tmp_path / "x")
    assert load(folder, pooling_position="last").settings.pooling_position == "last"
    assert load(folder, read_out="at_token").settings.pooling_position == "at_token"
    assert "read_out is now called pooling_position" in caplog.text
    with pytest.raises(ModelError, match=r"unknown settings \['colour'\]"):
        load(folder, colour="red")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"traceir\.json.*line 1"),
        ('{"format": 2}', "format is not 1"),
        ('{"format": 1, "colour": 1}', "colour"),
        ('{"format": 1, "read_out": "mean"}', "'mean'.*before_token, at_token, last"),
        ('{"format": 1, "prompt_version": "trace-9"}', "trace-1, brief-1"),
        ('{"format": 1, "matryoshka_dims": ["64"]}', "no list of widths"),
        ('{"format": 1, "matryoshka_dims": 64}', "no list of widths"),
    ],
)
def test_broken_settings_name_file_and_field(model: TraceModel, tmp_path: Path, content: str, message: str) -> None:
    folder = save(model, tmp_path / "x")
    (folder / "traceir.json").write_text(content)
    with pytest.raises((ModelError, ValueError), match=message):
        load(folder)
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)


def test_adding_emb_never_shrinks_the_vocabulary(tmp_path: Path) -> None:
    """Qwen publishes its checkpoints without `<|emb|>` and with spare rows; one more row is made where those are used up."""
    folder = published(tmp_path / "published", "qwen2_5_vl")
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    for spare in (1, 0):
        tokenizer, rows = AutoTokenizer.from_pretrained(folder), network.get_input_embeddings().weight.shape[0]
        tokenizer.add_tokens([f"<{number}>" for number in range(rows - spare - len(tokenizer))])
        new = add_token(network, tokenizer, EMB)
        assert add_token(network, tokenizer, EMB) == new, "adding twice changes nothing"
        assert network.get_input_embeddings().weight.shape[0] == max(rows, new + 1) == rows + 1 - spare
        assert bool(torch.isfinite(network.lm_head.weight[new]).all())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards, as transformers saves large ones."""
    made, folder = random_model(), tmp_path_factory.mktemp("sharded")
    made.network.save_pretrained(folder, max_shard_size="100KB")
    made.processor.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize("many", [False, True])
def test_what_lies_beside_the_weights_is_no_part_of_them(sharded: Path, tmp_path: Path, many: bool) -> None:
    folder = shutil.copytree(sharded, tmp_path / "many") if many else save(random_model(), tmp_path / "one")
    whole = fingerprint(folder)
    assert whole == fingerprint(folder, list(folder.glob("*.safetensors"))), "as earlier releases counted it"
    for stray in ("optimiser", "consolidated", "model.fp16", "ema", "a", "model-00001-of-00009", "adapter_model"):
        save_file({"x": torch.ones(3)}, folder / f"{stray}.safetensors")
    assert fingerprint(folder) == load(folder).fingerprint == load(folder, inference=True).fingerprint == whole
    weights = next(folder.glob("model-00002*" if many else "model.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    assert fingerprint(folder) != whole


def test_weights_are_found_as_transformers_finds_them(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "cache" / "snapshot", copy_function=lambda a, b: Path(b).symlink_to(a))
    assert fingerprint(folder) == load(folder).fingerprint == fingerprint(sharded), "the hub's cache holds links"
    other = save(random_model(1), tmp_path / "other")
    head = load(other).network.lm_head.weight
    for file in sharded.glob("model*"):
        shutil.copy(file, other)
    for inference in (False, True):
        assert torch.equal(load(other, inference=inference).network.lm_head.weight, head), "one whole file goes before shards"
    assert fingerprint(other) == load(other).fingerprint != fingerprint(sharded)


def test_a_shard_that_is_missing_and_weights_that_are_damaged_are_named(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "part")
    lost = next(folder.glob("model-00002*"))
    lost.unlink()
    for refused in (fingerprint, load):
        with pytest.raises(ModelError, match=f"part lacks weights that it names: {lost.name}; copy it again"):
            refused(folder)
    damaged = save(random_model(), tmp_path / "model")
    (damaged / "model.safetensors").write_bytes(b"\x00" * 100)
    for inference in (False, True):
        with pytest.raises(ModelError, match="cannot load"):
            load(damaged, inference=inference)


def _index(folder: Path, name: str, file: str) -> None:
    torch.save({"x": torch.ones(3)}, folder / "shard.bin")
    save_file({"x": torch.ones(3)}, folder.parent / "away.safetensors")
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": {"x": file}}))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: torch.save({"x": torch.ones(3)}, folder / "pytorch_model.bin"),
        lambda folder: [torch.save({"x": torch.ones(3)}, folder / f"model.{end}") for end in ("pt", "pth", "ckpt", "pkl")],
        lambda folder: _index(folder, "pytorch_model.bin.index.json", "shard.bin"),
        lambda folder: _index(folder, "model.safetensors.index.json", "shard.bin"),
        lambda folder: _index(folder, "model.safetensors.index.json", "../away.safetensors"),
        lambda folder: (folder / "config.json").write_text(
            (folder / "config.json").read_text().replace("{", '{"transformers_weights": "adapter_model.bin",', 1)
        ),
    ],
    ids=["pytorch_model.bin", "other pickles", "index of .bin", "safetensors index of .bin", "away", "named in config.json"],
)
def test_pickles_are_never_opened(
    model: TraceModel, tmp_path: Path, spoil: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(model, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    spoil(folder)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
    for inference in (False, True):
        with pytest.raises(ModelError, match=r"TraceIR reads weights from \.safetensors only.*save_pretrained"):
            load(folder, inference=inference)


def test_no_code_of_a_checkpoint_is_run_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(random_model(), tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
        (folder / name).write_text(json.dumps(content))
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    assert load(folder).width == 48
