"""Qwen2.5-VL as it is published, Qwen3-VL and Qwen3.5: what is read, written and learnt, against transformers' own code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import ALL, FACTOR, KINDS, published
from conftest import image_of
from safetensors.torch import load_file, save_file
from test_adapter import learn, vectors
from test_encoder import generate_one
from test_gradcache import batch_of, examples, furthest, gradients, plain_gradients
from test_serve_scheduler import same
from transformers import Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from traceir.adapter import attach, projectors, save_adapter
from traceir.decoding import DecodeBatch, Decoder, keep_rows, merge_batches, trim
from traceir.encoder import Encoder
from traceir.errors import ModelError
from traceir.images import ImageInput
from traceir.items import Query
from traceir.model import TraceModel, load, save
from traceir.prompts import IMAGE_PAD, render_query
from traceir.train.gradcache import Objective, Reader


class WithoutVideo(Qwen3VLProcessor):
    """The stock processor, whose check of its parts needs torchvision even where there is no part for videos."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> None:
        if argument is not None:
            super().check_argument_for_proper_class(argument_name, argument)


SHAPES = ((97, 31), (640, 480), (64, 200), (20, 20))


@pytest.fixture(scope="module", params=sorted(ALL))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("hub") / request.param, request.param)


others = pytest.mark.parametrize("folder", sorted(KINDS), indirect=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> TraceModel:
    """Its `<|emb|>` wins at some step of some queries."""
    made = load(folder, prompt_version="brief-1", max_reasoning_tokens=8)
    torch.manual_seed(1)
    weight = made.network.get_input_embeddings().weight
    with torch.no_grad():
        weight[made.processor.emb_id] = 3.0 * weight.std() * torch.randn(weight.shape[1])
    return made


@pytest.fixture(scope="module")
def asked() -> list[Query]:
    """Texts of several lengths, images of several shapes, both, and two images."""
    shown = [image_of(number, *SHAPES[number % 4]) for number in range(4)]
    return [
        Query.of(text="red cube"), Query.of(image=shown[0]), Query.of(text="make one red " * 5, image=shown[1]),
        Query((shown[2], "red ball left", shown[3], "then a green cone")), Query.of(text="a blue ball " * 9),
        Query.of(text="find", image=shown[3], instruction="find the image"),
    ]  # fmt: skip


def test_ids_positions_pixels_and_states_are_those_of_transformers(folder: Path, model: TraceModel, asked: list[Query]) -> None:
    stock = WithoutVideo(Qwen2VLImageProcessorPil.from_pretrained(folder), model.processor.tokenizer)
    for query in asked:
        prompt = render_query(query, "brief-1")
        text = "".join(IMAGE_PAD if isinstance(piece, ImageInput) else piece.text for piece in prompt.pieces)
        images = [image.load() for image in query.images] or None
        wanted = stock(text=[text], images=images, return_tensors="pt", add_special_tokens=False)
        batch = model.processor.collate([model.processor.lay_out(prompt)])
        assert batch.ids.tolist() == wanted["input_ids"].tolist()
        shown = {}
        if images:
            assert batch.grids is not None and batch.grids.tolist() == wanted["image_grid_thw"].tolist()
            torch.testing.assert_close(batch.patches, wanted["pixel_values"], atol=1e-6, rtol=0)
            shown = {"pixel_values": wanted["pixel_values"], "image_grid_thw": wanted["image_grid_thw"]}
            types = {"mm_token_type_ids": wanted["mm_token_type_ids"], "image_grid_thw": wanted["image_grid_thw"]}
            assert torch.equal(model.network.model.get_rope_index(wanted["input_ids"], **types)[0], batch.positions)
        with torch.no_grad():
            model.network.model.rope_deltas = None
            theirs = model.network.model(
                input_ids=wanted["input_ids"], attention_mask=torch.ones_like(wanted["input_ids"]),
                mm_token_type_ids=wanted["mm_token_type_ids"], **shown,
            ).last_hidden_state  # fmt: skip
            torch.testing.assert_close(model.hidden(batch), theirs, atol=1e-5, rtol=0)


@others
@pytest.mark.parametrize("route", ["auto", "direct"])
def test_a_padded_batch_equals_its_singles_whose_rows_come_and_go(model: TraceModel, asked: list[Query], route: str) -> None:
    encoder = Encoder(model, batch_rows=2, decode_rows=5)  # prefilled by twos, of other lengths, that then write together
    together = encoder.encode_queries(asked, route=route)
    for query, encoding in zip(asked, together, strict=True):
        (alone,) = encoder.encode_queries([query], route=route)
        assert same(encoding, alone)
        np.testing.assert_allclose(encoding.vector, alone.vector, atol=2e-5)


def test_what_is_written_is_what_generate_writes_and_one_forward_reads(model: TraceModel, asked: list[Query]) -> None:
    processor, ended = model.processor, set()
    for query, encoding in zip(asked, Encoder(model).encode_queries(asked, route="reason"), strict=True):
        vector, written = generate_one(model, query, 8)
        if written[0] == processor.emb_id:
            continue  # would have bypassed
        kept = written[: encoding.tokens]
        assert encoding.reasoning == processor.decode(kept) and encoding.truncated == (processor.emb_id not in written)
        layout = processor.lay_out(render_query(query, "brief-1"))
        start = int(layout.positions.max()) + 1
        columns = np.broadcast_to(np.arange(start, start + len(kept)), (3, len(kept)))
        ids, positions = np.concatenate([layout.ids, kept]), np.concatenate([layout.positions, columns], axis=1)
        whole = replace(layout, ids=ids, positions=positions, targets=np.full(len(ids), -100))
        with torch.no_grad():
            state = model.hidden(processor.collate([whole]))[0, -1]
        np.testing.assert_allclose(encoding.vector, torch.nn.functional.normalize(state, dim=-1).numpy(), atol=2e-5)
        if not encoding.truncated:
            np.testing.assert_allclose(encoding.vector, vector, atol=2e-5)
        ended.add(encoding.ended)
    assert "budget" in ended


def _writing(decoder: Decoder, query: Query, number: int) -> DecodeBatch:
    layout = decoder.model.processor.lay_out(decoder.model.prompt(query))
    _, batch = decoder.prefill([number], [layout], "reason")
    assert batch is not None
    return batch


@others
def test_rows_join_and_leave_a_batch_that_writes_and_columns_nobody_reads_are_cut(
    model: TraceModel, asked: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traceir.decoding.TRIM", 1)
    decoder = Decoder(model, 8, None)
    wanted = Encoder(model).encode_queries(asked, route="reason")
    batch, done = _writing(decoder, asked[3], 3), []
    for number in (0, 4, 1, 2):
        done += decoder.step(batch) if batch.rows else []
        batch = merge_batches([part for part in (batch, _writing(decoder, asked[number], number)) if part.rows])
        trim(batch)
        assert batch.mask_BT.any(dim=0)[0], "a column that no row reads is cut off"
    keep_rows(batch, [index for index, row in enumerate(batch.rows) if row.number != 2])
    while batch.rows:
        done += decoder.step(batch)
        trim(batch)
    assert sorted(number for number, _ in done) == [0, 1, 3, 4]
    assert all(same(encoding, wanted[number]) for number, encoding in done)


@others
def test_the_closing_text_is_read_by_the_row_that_stops_short_and_by_no_other(model: TraceModel, asked: list[Query]) -> None:
    closing = TraceModel(model.network, model.processor, replace(model.settings, closing="red cube"))
    together = Encoder(closing, max_reasoning_tokens=3).encode_queries(asked, route="reason")
    plain = Encoder(model, max_reasoning_tokens=3).encode_queries(asked, route="reason")
    assert any(encoding.truncated for encoding in plain)
    for query, encoding, before in zip(asked, together, plain, strict=True):
        assert same(encoding, Encoder(closing, max_reasoning_tokens=3).encode_queries([query], route="reason")[0])
        assert encoding.reasoning == before.reasoning
        assert encoding.truncated == (float(encoding.vector @ before.vector) < 0.9999)


@others
def test_gradients_of_the_cached_step_are_those_of_the_loss_written_out(folder: Path) -> None:
    double = load(folder, prompt_version="brief-1")
    double.network.double()
    rows = examples(8, negatives=1)
    batch = batch_of(double, rows, 120)
    chunk = batch.queries[0].batch
    assert len(batch.queries) > 2 and chunk.patches is not None and chunk.patches.dtype == torch.uint8
    cached, plain = gradients(double, batch, Objective(), cache=True), plain_gradients(double, Objective(), rows)
    assert any("visual.merger" in name for name in cached)
    assert any("deepstack" in name for name in cached) == (len(projectors(double.network)) > 1)
    # A Gated DeltaNet computes in float32, whatever it is given.
    assert furthest(cached, plain) < (1e-9 if double.network.config.model_type == "qwen3_vl" else 1e-3)


@others
def test_every_part_that_trains_takes_part_in_a_chunk_without_images(folder: Path) -> None:
    model = load(folder, prompt_version="brief-1")
    rows = [replace(example, query=Query.of(text="red cube")) for example in examples(2)]
    chunk = batch_of(model, rows, 10**6).queries[0]
    state, _, total = Reader(model, 0.1)(chunk, True, True)
    (state.sum() + total).backward()
    for projector in projectors(model.network).values():
        assert all(parameter.grad is not None for parameter in projector.parameters())


@pytest.mark.slow
@others
def test_an_adapter_reaches_every_linear_layer_and_every_projector(folder: Path, tmp_path: Path) -> None:
    model = load(folder, prompt_version="brief-1")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    adapter = attach(model, rank=2, alpha=4, dropout=0.0, train_projector=True, seed=0)
    learn(model, adapter)
    again = load(save_adapter(model, adapter, tmp_path / "adapter", str(folder)))
    np.testing.assert_allclose(vectors(again), vectors(model), atol=2e-5)
    after = again.network.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    modules = again.network.model.language_model.named_modules()
    linears = {f"model.language_model.{name}.weight" for name, module in modules if isinstance(module, torch.nn.Linear)}
    gates = {name for name in linears if "in_proj_a" in name or "in_proj_b" in name}
    assert changed >= linears - gates and not [name for name in changed if "in_proj_a" in name or "A_log" in name]
    assert {name for name in changed if "visual" in name} == {
        f"model.{name}.{part}" for name, module in projectors(again.network).items() for part, _ in module.named_parameters()
    }


@pytest.mark.slow
@others
def test_a_base_in_bfloat16_trains_adapters_in_float32_without_autocast_too(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16)
    adapter = attach(model, rank=2, alpha=4, dropout=0.0, train_projector=True, seed=0)
    learn(model, adapter, steps=1)
    trained = [value for value in adapter.parameters() if value.requires_grad]
    assert {value.dtype for value in trained} == {torch.float32} and all(torch.isfinite(value).all() for value in trained)


def test_it_is_saved_and_read_again(model: TraceModel, asked: list[Query], tmp_path: Path) -> None:
    again = load(save(model, tmp_path / "saved"))
    assert again.processor.image == model.processor.image and again.processor.image.factor == FACTOR
    first, second = (Encoder(side).encode_queries(asked, route="reason") for side in (model, again))
    assert all(same(before, other) for before, other in zip(first, second, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_saved_without_its_output_matrix_is_read_and_said_to_be(
    tmp_path: Path, tied: bool, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load(published(tmp_path / "whole", "qwen3_vl"))
    bare = load(published(tmp_path / "bare", "qwen3_vl", tied=tied, bare=True))
    assert ("has no output matrix" in caplog.text) == (not tied)
    np.testing.assert_array_equal(vectors(bare), vectors(whole))
    assert bare.network.lm_head.weight is bare.network.get_input_embeddings().weight
    assert load(save(bare, tmp_path / "saved")).network.config.tie_word_embeddings


def test_weights_that_are_missing_are_never_drawn_at_random(tmp_path: Path) -> None:
    folder = published(tmp_path / "part", "qwen3_vl")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.language_model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.weight"):
        load(folder)
