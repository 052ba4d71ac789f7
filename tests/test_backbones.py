"""Qwen3-VL and Qwen3.5: what is read, written and learnt, against transformers' own processor, forward and generate."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from backbones import CELL, KINDS, published
from conftest import picture
from safetensors.torch import load_file, save_file
from test_adapter import learn, vectors
from test_encoder import generate_one
from test_gradcache import batch_of, examples, furthest, gradients, plain_gradients
from test_serve_scheduler import same, scheduling
from transformers import Qwen3VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from traceir.adapter import attach, load_adapter, projectors, save_adapter
from traceir.decoding import Decoder, Wave, _copy_row, merge_waves, trim
from traceir.encoder import Encoder
from traceir.errors import ModelError
from traceir.images import ImageInput
from traceir.items import Query
from traceir.model import TraceModel, load, save
from traceir.prompts import IMAGE_PAD, Piece, Special, UserText, render_query
from traceir.train.gradcache import Objective


class WithoutVideo(Qwen3VLProcessor):
    """The stock processor, whose check of its parts needs torchvision even where there is no part for videos."""

    def check_argument_for_proper_class(self, argument_name: str, argument: object) -> None:
        if argument is not None:
            super().check_argument_for_proper_class(argument_name, argument)


SHAPES = ((97, 31), (640, 480), (64, 200), (20, 20))


@pytest.fixture(scope="module", params=sorted(KINDS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return published(tmp_path_factory.mktemp("hub") / request.param, request.param)


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
    """Texts of several lengths, pictures of several shapes, both, and two pictures."""
    shown = [picture(number, *SHAPES[number % 4]) for number in range(4)]
    return [
        Query.of(text="red cube"), Query.of(image=shown[0]), Query.of(text="make one red " * 5, image=shown[1]),
        Query((shown[2], "red ball left", shown[3], "then a green cone")), Query.of(text="a blue ball " * 9),
        Query.of(text="find", image=shown[3], instruction="find the image"),
    ]  # fmt: skip


def written_out(piece: Piece) -> str:
    if isinstance(piece, ImageInput):
        return IMAGE_PAD
    return piece.token if isinstance(piece, Special) else piece.text if isinstance(piece, UserText) else str(piece)


def test_ids_positions_pixels_and_states_are_those_of_transformers(folder: Path, model: TraceModel, asked: list[Query]) -> None:
    stock = WithoutVideo(Qwen2VLImageProcessorPil.from_pretrained(folder), model.processor.tokenizer)
    for query in asked:
        text = "".join(written_out(piece) for piece in render_query(query, "brief-1").pieces)
        images = [part.load() for part in query.images]
        wanted = stock(text=[text], images=images or None, return_tensors="pt", add_special_tokens=False)
        batch = model.processor.collate([model.processor.lay_out(render_query(query, "brief-1"))])
        assert batch.ids.tolist() == wanted["input_ids"].tolist()
        pictures = {}
        if images:
            assert batch.grids is not None and batch.grids.tolist() == wanted["image_grid_thw"].tolist()
            assert batch.patches is not None
            torch.testing.assert_close(batch.patches, wanted["pixel_values"], atol=1e-6, rtol=0)
            pictures = {"pixel_values": wanted["pixel_values"], "image_grid_thw": wanted["image_grid_thw"]}
            index, _ = model.network.model.get_rope_index(
                wanted["input_ids"], wanted["mm_token_type_ids"], image_grid_thw=wanted["image_grid_thw"]
            )
            assert torch.equal(index, batch.positions)
        with torch.no_grad():
            ours = model.hidden(batch)
            model.network.model.rope_deltas = None
            theirs = model.network.model(
                input_ids=wanted["input_ids"], attention_mask=torch.ones_like(wanted["input_ids"]),
                mm_token_type_ids=wanted["mm_token_type_ids"], **pictures,
            ).last_hidden_state  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("route", ["auto", "reason", "direct"])
def test_a_padded_batch_equals_its_singles_whose_rows_come_and_go(model: TraceModel, asked: list[Query], route: str) -> None:
    encoder = Encoder(model, batch_rows=2, wave_rows=5)  # prefilled by twos, of other lengths, that then write as one wave
    together = encoder.encode_queries(asked, route=route)
    for query, one in zip(asked, together, strict=True):
        (alone,) = encoder.encode_queries([query], route=route)
        assert same(one, alone)
        np.testing.assert_allclose(one.vector, alone.vector, atol=2e-5)


def test_what_is_written_is_what_generate_writes_and_one_forward_reads(model: TraceModel, asked: list[Query]) -> None:
    processor, ended = model.processor, set()
    for query, one in zip(asked, Encoder(model).encode_queries(asked, route="reason"), strict=True):
        vector, written = generate_one(model, query, 8)
        if written[0] == processor.emb_id:
            continue  # would have bypassed
        kept = written[: one.tokens]
        assert one.reasoning == processor.decode(kept) and one.truncated == (processor.emb_id not in written)
        layout = processor.lay_out(render_query(query, "brief-1"))
        start = int(layout.positions.max()) + 1
        places = np.broadcast_to(np.arange(start, start + len(kept)), (3, len(kept)))
        ids, positions = np.concatenate([layout.ids, kept]), np.concatenate([layout.positions, places], axis=1)
        whole = replace(layout, ids=ids, positions=positions, targets=np.full(len(ids), -100))
        with torch.no_grad():
            state = model.hidden(processor.collate([whole]))[0, -1]
        read = torch.nn.functional.normalize(state, dim=-1).numpy()
        np.testing.assert_allclose(one.vector, read, atol=2e-5)
        if not one.truncated:
            np.testing.assert_allclose(one.vector, vector, atol=2e-5)
        ended.add(one.ended)
    assert ended == {None, "budget"}, "the fixture must have both"


def _wave(decoder: Decoder, query: Query, number: int) -> Wave:
    layout = decoder.model.processor.lay_out(decoder.model.prompt(query))
    _, wave = decoder.prefill([number], [layout], "reason")
    assert wave is not None
    return wave


def test_rows_join_a_wave_that_writes_and_columns_nobody_reads_are_cut(
    model: TraceModel, asked: list[Query], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("traceir.decoding.TRIM", 1)
    decoder = Decoder(model, 8, None)
    wanted = Encoder(model).encode_queries(asked, route="reason")
    wave, done = _wave(decoder, asked[3], 3), []
    for number in (0, 4, 1):
        done += decoder.step(wave) if wave.rows else []
        wave = merge_waves([one for one in (wave, _wave(decoder, asked[number], number)) if one.rows])
        trim(wave)
        assert wave.mask_BT.any(dim=0)[0], "a column that no row reads is cut off"
    while wave.rows:
        done += decoder.step(wave)
        trim(wave)
    assert sorted(number for number, _ in done) == [0, 1, 3, 4]
    for number, one in done:
        assert same(one, wanted[number])


def test_a_copied_row_goes_on_alone_and_leaves_the_wave_as_it_was(model: TraceModel, asked: list[Query]) -> None:
    decoder = Decoder(model, 8, None)
    wave = merge_waves([_wave(decoder, asked[number], number) for number in (2, 5)])
    mask = torch.nn.functional.pad(wave.mask_BT, (0, 1), value=1)
    place = torch.tensor([row.place for row in wave.rows])
    copied = _copy_row(wave.cache, 1)
    with torch.inference_mode():
        alone = model.step(wave.next_B[1:], place[1:], mask[1:], copied)
        both = model.step(wave.next_B, place, mask, wave.cache)
    np.testing.assert_allclose(alone[0].numpy(), both[1].numpy(), atol=2e-5)


def test_the_server_gives_what_the_encoder_gives(model: TraceModel, asked: list[Query]) -> None:
    wanted = Encoder(model).encode_queries(asked, route="reason")

    async def work() -> None:
        async with scheduling(model, writing=3, remembered=0) as scheduler:

            async def ask(number: int) -> None:
                await asyncio.sleep(0.004 * number)
                served = await scheduler.encode_query(asked[number], "reason")
                assert same(served.encoding, wanted[number])

            await asyncio.gather(*(ask(number) for number in range(len(asked))))

    asyncio.run(asyncio.wait_for(work(), 60))


def test_gradients_of_the_cached_step_are_those_of_the_loss_written_out(folder: Path) -> None:
    double = load(folder, prompt_version="brief-1")
    double.network.double()
    rows = examples(8, negatives=1)
    turn = batch_of(double, rows, 120)
    chunk = turn.queries[0].batch
    assert len(turn.queries) > 2 and chunk.patches is not None and chunk.patches.dtype == torch.uint8
    found, plain = gradients(double, turn, Objective(), cache=True), plain_gradients(double, Objective(), rows)
    assert any("visual.merger" in name for name in found)
    assert any("deepstack" in name for name in found) == (len(projectors(double.network)) > 1)
    # A Gated DeltaNet computes in float32, whatever it is given.
    assert furthest(found, plain) < (1e-9 if double.network.config.model_type == "qwen3_vl" else 1e-3)


def test_every_part_that_trains_takes_part_in_a_chunk_without_images(folder: Path) -> None:
    model = load(folder, prompt_version="brief-1")
    from traceir.train.gradcache import Reader

    reader = Reader(model, 0.1)
    rows = [replace(one, query=Query.of(text="red cube")) for one in examples(2)]
    chunk = batch_of(model, rows, 10**6).queries[0]
    state, _, total = reader(chunk, True, True)
    (state.sum() + total).backward()
    for projector in projectors(model.network).values():
        assert all(parameter.grad is not None for parameter in projector.parameters())


def test_an_adapter_reaches_every_linear_layer_and_every_projector(folder: Path, tmp_path: Path) -> None:
    model = load(folder, prompt_version="brief-1")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    adapter = attach(model, rank=2, alpha=4, dropout=0.0, train_projector=True, seed=0)
    learn(model, adapter)
    saved = save_adapter(model, adapter, tmp_path / "adapter", str(folder))
    again = load_adapter(saved)
    np.testing.assert_allclose(vectors(again), vectors(model), atol=2e-5)
    after = again.network.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    linears = {
        name for name, module in again.network.model.language_model.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(("in_proj_a", "in_proj_b"))
    }  # fmt: skip
    assert changed >= {f"model.language_model.{name}.weight" for name in linears}
    assert {name for name in changed if "visual" in name} == {
        f"model.{name}.{part}" for name, module in projectors(again.network).items() for part, _ in module.named_parameters()
    }
    assert not [name for name in changed if "in_proj_a" in name or "A_log" in name]


def test_a_base_in_bfloat16_trains_adapters_in_float32_without_autocast_too(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16)
    adapter = attach(model, rank=2, alpha=4, dropout=0.0, train_projector=True, seed=0)
    learn(model, adapter, steps=1)
    trained = [value for value in adapter.parameters() if value.requires_grad]
    assert {value.dtype for value in trained} == {torch.float32} and all(torch.isfinite(value).all() for value in trained)


def test_it_is_saved_and_read_again(model: TraceModel, asked: list[Query], tmp_path: Path) -> None:
    again = load(save(model, tmp_path / "saved"))
    assert again.processor.image == model.processor.image and again.processor.image.patch * again.processor.image.merge == CELL
    first, second = (Encoder(one).encode_queries(asked, route="reason") for one in (model, again))
    assert all(same(one, other) for one, other in zip(first, second, strict=True))


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
