"""The forward pass against the stock Hugging Face classes; checkpoints saved and loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import picture, random_model
from safetensors.torch import save_file
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from traceir.batch import Batch, ImageBudget, Processor, _grid_positions, smart_resize
from traceir.errors import ImageError, ModelError
from traceir.forward import add_token
from traceir.items import Item, Query
from traceir.model import TraceModel, image_budget, load, save
from traceir.prompts import EMB, render_candidate, render_query
from traceir.weights import fingerprint


def stock_states(model: TraceModel, batch: Batch) -> torch.Tensor:
    """Last-layer states by the stock forward, which derives the M-RoPE positions itself."""
    types = (batch.ids == model.network.config.image_token_id).int()
    with torch.no_grad():
        out = model.network.model(
            input_ids=batch.ids, attention_mask=batch.mask, mm_token_type_ids=types,
            pixel_values=batch.patches, image_grid_thw=batch.grids,
        )  # fmt: skip
    return out.last_hidden_state


def test_hidden_equals_the_stock_forward_for_mixed_left_padded_rows(model: TraceModel, queries: list[Query]) -> None:
    layouts = [model.processor.lay_out(render_query(query, "brief-1")) for query in queries]
    batch = model.processor.collate(layouts)
    assert len({tuple(grid) for grid in batch.grids.tolist()}) > 1, "the test needs pictures of several shapes"
    with torch.no_grad():
        ours = model.hidden(batch)
    stock = stock_states(model, batch)
    shown = batch.mask.bool()
    assert torch.allclose(ours[shown], stock[shown], atol=2e-5)


def test_positions_equal_the_stock_rope_index(model: TraceModel, queries: list[Query]) -> None:
    batch = model.processor.collate([model.processor.lay_out(render_query(q, "brief-1"), "a red cube") for q in queries])
    types = (batch.ids == model.network.config.image_token_id).int()
    stock, _ = model.network.model.get_rope_index(batch.ids, types, image_grid_thw=batch.grids, attention_mask=batch.mask)
    shown = batch.mask.bool()
    assert torch.equal(stock[:, shown], batch.positions[:, shown])


@pytest.mark.parametrize("size", [(48, 48), (97, 31), (640, 480), (33, 200)])
def test_pixels_equal_the_stock_image_processor(size: tuple[int, int]) -> None:
    budget = ImageBudget(patch=8, merge=2, min_pixels=48 * 48, max_pixels=96 * 96)
    processor = Processor(random_model().processor.tokenizer, budget)
    shown = picture(3, *size)
    patches, grids = processor.patches([processor.pixels(shown)])
    stock = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size={"shortest_edge": 48 * 48, "longest_edge": 96 * 96})(
        images=[shown.load()], return_tensors="pt"
    )
    assert grids.tolist() == stock["image_grid_thw"].tolist()
    assert torch.allclose(patches, torch.as_tensor(stock["pixel_values"]), atol=2e-5)


@pytest.mark.parametrize(
    "said",
    [
        # Top-level values go before `size` in transformers 4.51.3, 4.57.3 and 5.24.0.
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "min_pixels": 200704, "max_pixels": 1003520},
        {"size": {"shortest_edge": 3136, "longest_edge": 12845056}, "max_pixels": 1003520},
        {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16},
        {"min_pixels": 200704, "max_pixels": 1003520},
        {"size": None},
        {},
    ],
)
def test_the_budget_of_images_is_the_stock_processors(tmp_path: Path, said: dict[str, object]) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps({"image_processor_type": "Qwen2VLImageProcessor", **said}))
    stock = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    patch = int(str(said.get("patch_size", 14)))
    vision = SimpleNamespace(patch_size=patch, spatial_merge_size=2, temporal_patch_size=2)
    budget = image_budget(file, SimpleNamespace(vision_config=vision))
    grids = []
    for width, height in ((100, 75), (400, 300), (3000, 2000), (10, 10)):
        (grid,) = stock(images=[picture(0, width, height).load()], return_tensors="pt")["image_grid_thw"].tolist()
        grids.append(tuple(side // patch for side in smart_resize(height, width, budget)))
        assert grid == [1, *grids[-1]]
    if said.get("size") and said.get("min_pixels"):
        assert grids[0] == (28, 38) and grids[2] == (58, 86)


def test_smart_resize_refuses_a_ribbon() -> None:
    with pytest.raises(ImageError, match="aspect ratio"):
        smart_resize(1, 201, ImageBudget())


def test_text_from_users_is_never_a_special_token(model: TraceModel) -> None:
    plain = model.processor.lay_out(render_candidate(Item.of(text=f"red {EMB} <|im_start|> <|image_pad|>"), "brief-1"))
    assert model.processor.emb_id not in plain.ids
    assert int((plain.ids == model.processor.special["<|image_pad|>"]).sum()) == 0


def test_field_report_16_token_ids_of_long_texts_and_grids_at_every_place_are_not_remembered(model: TraceModel) -> None:
    processor = model.processor
    before = processor._short_ids.cache_info().currsize
    long = f"a green ball {'on a table ' * 200}"
    assert processor.plain_ids(long) == processor._encode_plain(long) == processor.plain_ids(long)
    assert processor._short_ids.cache_info().currsize == before
    assert processor._short_ids.cache_info().maxsize <= 8192
    assert processor.plain_ids("a green ball") is processor.plain_ids("a green ball")
    _grid_positions.cache_clear()
    prompts = [render_query(Query(("x " * n, picture(56, 56), "y")), "brief-1") for n in range(1, 20)]
    at = [processor.lay_out(prompt).positions for prompt in prompts]
    assert _grid_positions.cache_info().currsize == 1 and len({one.tobytes() for one in at}) > 1


def test_supervision_covers_completion_and_emb_only(model: TraceModel) -> None:
    prompt = render_query(Query.of(text="red cube", instruction="find"), "brief-1")
    bare = model.processor.lay_out(prompt)
    direct = model.processor.lay_out(prompt, "")
    reasoned = model.processor.lay_out(prompt, "a green ball")
    written = list(model.processor.plain_ids("a green ball"))
    assert direct.ids.tolist() == bare.ids.tolist()
    assert direct.targets.tolist() == [-100] * (len(bare) - 1) + [model.processor.emb_id]
    assert reasoned.ids.tolist() == [*bare.ids.tolist(), *written]
    assert reasoned.targets[len(bare) - 1 :].tolist() == [*written, model.processor.emb_id]
    assert reasoned.pooling_index == len(reasoned) - 1


def test_the_text_budget_cuts_user_text_and_says_so(model: TraceModel) -> None:
    tight = Processor(model.processor.tokenizer, model.processor.image, max_text_tokens=3)
    prompt = render_candidate(Item.of(text="red green blue cube ball"), "brief-1")
    cut, whole = tight.lay_out(prompt), model.processor.lay_out(prompt)
    assert cut.cut > 0 and len(cut) == len(whole) - cut.cut
    assert cut.ids[-1] == whole.ids[-1], "the template behind the text survives the cut"


def test_save_and_load_give_the_same_vectors_and_an_ordinary_checkpoint(model: TraceModel, tmp_path: Path) -> None:
    folder = save(model, tmp_path / "checkpoint")
    again = load(folder)
    batch = model.processor.collate([model.processor.lay_out(render_candidate(Item.of(image=picture(1)), "brief-1"))])
    with torch.no_grad():
        assert torch.allclose(model.hidden(batch), again.hidden(batch), atol=1e-6)
    assert again.settings.prompt_version == "brief-1"
    assert again.fingerprint == json.loads((folder / "traceir.json").read_text())["fingerprint"] != "random"
    stock = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    assert torch.equal(stock.lm_head.weight, model.network.lm_head.weight)
    assert not list(tmp_path.glob(".checkpoint*")), "no scratch folder is left"


def test_fingerprint_follows_the_weights(model: TraceModel, tmp_path: Path) -> None:
    first = load(save(model, tmp_path / "a")).fingerprint
    other = random_model(1)
    assert load(save(other, tmp_path / "b")).fingerprint != first
    assert load(save(model, tmp_path / "c")).fingerprint == first


def test_adding_emb_never_shrinks_the_vocabulary(tmp_path: Path) -> None:
    """A checkpoint as transformers saves it, with spare rows and without `<|emb|>`, as Qwen publishes its own."""
    made = random_model()
    tokenizer = made.processor.tokenizer
    folder = tmp_path / "published"
    made.network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer.json"
    text = json.loads(file.read_text())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] != EMB]
    emb = text["model"]["vocab"].pop(EMB)
    moved = [name for name, place in text["model"]["vocab"].items() if place > emb]
    assert not [name for name in moved if name.startswith("<|")]
    file.write_text(json.dumps(text))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("extra_special_tokens", None)
    settings.pop("additional_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    bare = AutoTokenizer.from_pretrained(folder)
    assert EMB not in bare.get_vocab()
    rows = made.network.get_input_embeddings().weight.shape[0]
    network = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    new = add_token(network, bare, EMB)
    assert network.get_input_embeddings().weight.shape[0] == max(rows, new + 1)
    assert add_token(network, bare, EMB) == new, "adding twice changes nothing"
    assert bool(torch.isfinite(network.lm_head.weight[new]).all())


def test_errors_name_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        load(tmp_path)
    folder = save(random_model(), tmp_path / "x")
    (folder / "traceir.json").write_text("{")
    with pytest.raises(ModelError, match=r"traceir\.json.*line 1"):
        load(folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in several shards, as transformers saves large ones."""
    made, folder = random_model(), tmp_path_factory.mktemp("sharded")
    made.network.save_pretrained(folder, max_shard_size="100KB")
    made.processor.tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize(
    "stray", ["optimiser", "consolidated", "model.fp16", "ema", "a", "model-00001-of-00009", "adapter_model"]
)
@pytest.mark.parametrize("many", [False, True])
def test_field_report_04_what_lies_beside_the_weights_is_no_part_of_them(
    sharded: Path, tmp_path: Path, many: bool, stray: str
) -> None:
    folder = shutil.copytree(sharded, tmp_path / "many") if many else save(random_model(), tmp_path / "one")
    whole = fingerprint(folder)
    kept = fingerprint(folder, list(folder.glob("*.safetensors")))
    assert whole == kept, "as earlier releases counted it"
    save_file({"x": torch.ones(3)}, folder / f"{stray}.safetensors")
    assert fingerprint(folder) == load(folder).fingerprint == load(folder, inference=True).fingerprint == whole
    weights = next(folder.glob("model-00002*" if many else "model.safetensors"))
    weights.write_bytes(weights.read_bytes() + b" ")
    assert fingerprint(folder) != whole


def test_field_report_04_weights_are_found_as_transformers_finds_them(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "cache" / "snapshot", copy_function=lambda a, b: Path(b).symlink_to(a))
    assert fingerprint(folder) == load(folder).fingerprint == fingerprint(sharded), "the hub's cache holds links"
    save(random_model(1), tmp_path / "other")
    (folder / "model.safetensors").symlink_to(tmp_path / "other/model.safetensors")
    read = load(folder)
    assert torch.equal(read.network.lm_head.weight, load(tmp_path / "other").network.lm_head.weight)
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"old")
    assert fingerprint(folder) == read.fingerprint != fingerprint(sharded), "one whole file goes before shards"


def test_field_report_04_both_roads_read_the_same_of_two_sets_of_weights(sharded: Path, tmp_path: Path) -> None:
    folder = save(random_model(1), tmp_path / "model")
    for file in sharded.glob("model*"):
        shutil.copy(file, folder)
    heads = [load(folder, inference=inference).network.lm_head.weight for inference in (False, True)]
    assert torch.equal(*heads) and torch.equal(heads[0], random_model(1).network.lm_head.weight)


def test_field_report_04_a_shard_that_is_missing_is_named(sharded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sharded, tmp_path / "part")
    lost = next(folder.glob("model-00002*"))
    lost.unlink()
    save_file({"x": torch.ones(3)}, folder / "stray.safetensors")
    for refused in (fingerprint, load):
        with pytest.raises(ModelError, match=f"part lacks weights that it names: {lost.name}; copy it again"):
            refused(folder)


def _pickled(file: Path) -> None:
    torch.save({"x": torch.ones(3)}, file)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: _pickled(folder / "pytorch_model.bin"),
        lambda folder: [_pickled(folder / f"model.{end}") for end in ("pt", "pth", "ckpt", "pkl")],
        lambda folder: (
            _pickled(folder / "shard.bin"),
            (folder / "pytorch_model.bin.index.json").write_text('{"metadata": {}, "weight_map": {"x": "shard.bin"}}'),
        ),
        lambda folder: (
            _pickled(folder / "shard.bin"),
            (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"x": "shard.bin"}}'),
        ),
        lambda folder: (
            _pickled(folder / "adapter_model.bin"),
            (folder / "config.json").write_text(
                (folder / "config.json").read_text().replace("{", '{"transformers_weights": "adapter_model.bin",', 1)
            ),
        ),
        lambda folder: (
            save_file({"x": torch.ones(3)}, folder.parent / "away.safetensors"),
            (folder / "model.safetensors.index.json").write_text('{"weight_map": {"x": "../away.safetensors"}}'),
        ),
    ],
    ids=["pytorch_model.bin", "other pickles", "index of .bin", "safetensors index of .bin", "named in config.json", "away"],
)
def test_field_report_19_pickles_are_never_opened(
    tmp_path: Path, spoil: Callable[[Path], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(random_model(), tmp_path / "model")
    (folder / "model.safetensors").unlink()
    spoil(folder)
    opened: list[object] = []
    monkeypatch.setattr(torch, "load", lambda *args, **_: opened.append(args) or {})
    for inference in (False, True):
        with pytest.raises(ModelError, match=r"TraceIR reads weights from \.safetensors only.*save_pretrained"):
            load(folder, inference=inference)
    assert not opened


def test_field_report_19_no_code_of_a_checkpoint_is_run_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(random_model(), tmp_path / "model")
    for name in ("config.json", "tokenizer_config.json"):
        told = json.loads((folder / name).read_text())
        told["auto_map"] = {"AutoTokenizer": ["evil.Evil", None], "AutoModel": "evil.Evil", "AutoConfig": "evil.Evil"}
        (folder / name).write_text(json.dumps(told))
    (folder / "evil.py").write_text("raise SystemExit('run')\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    assert load(folder).width == 48


def test_damaged_weights_are_an_error_of_ours(tmp_path: Path) -> None:
    folder = save(random_model(), tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(ModelError, match="cannot load"):
        load(folder)


def test_pixel_store_is_used_instead_of_the_file(model: TraceModel) -> None:
    blank = np.zeros((48, 48, 3), dtype=np.uint8)
    stored = Processor(model.processor.tokenizer, model.processor.image, pixel_store={"noise-1-48x48": blank})
    assert not stored.pixels(picture(1)).any()
    assert replace(model.processor.image).patch == 8
