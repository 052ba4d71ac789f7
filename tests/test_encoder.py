"""The adaptive encoder against plain `generate`, against itself one query at a time, and under threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import both_routes, image_of, random_model

from traceir.batch import PoolingPosition
from traceir.encoder import Encoder
from traceir.errors import InputError, StoreError
from traceir.index import open_index
from traceir.items import Encoding, Item, Query
from traceir.model import TraceModel
from traceir.prompts import TURN_END, render_query
from traceir.retrieval.search import Searcher


def generate_one(model: TraceModel, query: Query, budget: int) -> tuple[np.ndarray, list[int]]:
    """The reference: transformers' own generate, one query, the state that predicted `<|emb|>`."""
    batch = model.processor.collate([model.processor.lay_out(render_query(query, "brief-1"))])
    types = (batch.ids == model.network.config.image_token_id).int()
    shown = {"pixel_values": batch.patches, "image_grid_thw": batch.grids, "mm_token_type_ids": types}
    out = model.network.generate(
        input_ids=batch.ids, attention_mask=batch.mask, do_sample=False, **(shown if batch.patches is not None else {}),
        max_new_tokens=budget + 1, eos_token_id=model.processor.emb_id, pad_token_id=0,
        output_hidden_states=True, return_dict_in_generate=True,
    )  # fmt: skip
    written = out.sequences[0, batch.ids.shape[1] :].tolist()
    state = out.hidden_states[len(written) - 1][-1][0, -1]
    return torch.nn.functional.normalize(state, dim=-1).numpy(), written


def alike(first: Encoding, other: Encoding) -> bool:
    same = (first.route, first.reasoning, first.truncated) == (other.route, other.reasoning, other.truncated)
    return same and float(first.vector @ other.vector) > 0.99999 and abs(first.emb_probability - other.emb_probability) < 1e-4


def test_auto_equals_generate_for_bypassed_and_reasoned_queries(model: TraceModel, queries: list[Query]) -> None:
    encodings, ended = Encoder(model).encode_queries(queries), 0
    for query, encoding in zip(queries, encodings, strict=True):
        vector, written = generate_one(model, query, 12)
        assert encoding.truncated == (written[-1] != model.processor.emb_id)
        if not encoding.truncated:
            ended += 1
            assert encoding.tokens == len(written) - 1 and encoding.reasoning == model.processor.decode(written[:-1])
            assert float(encoding.vector @ vector) > 0.99999
    assert ended >= 12 and {encoding.route for encoding in encodings} == {"direct", "reason"}, "the fixture must take both routes"
    assert all((encoding.route == "direct") == (encoding.tokens == 0) for encoding in encodings)


@pytest.mark.parametrize("route", ["auto", "reason", "direct"])
def test_a_batch_equals_its_singles(model: TraceModel, queries: list[Query], route: str) -> None:
    encoder = Encoder(model, token_budget=300, decode_rows=5, batch_rows=7)
    for query, encoding in zip(queries, encoder.encode_queries(queries, route=route), strict=True):
        assert alike(encoder.encode_queries([query], route=route)[0], encoding)
        assert route == "auto" or (encoding.route, encoding.tokens > 0) == (route, route == "reason")


@pytest.mark.parametrize("position", ["before_token", "at_token"])
def test_a_bypass_is_the_direct_route(queries: list[Query], position: str) -> None:
    encoder = Encoder(both_routes(random_model(pooling_position=position), queries))
    auto, direct = (encoder.encode_queries(queries, route=route) for route in ("auto", "direct"))
    bypassed = [alike(own, other) for own, other in zip(auto, direct, strict=True) if own.route == "direct"]
    assert len(bypassed) >= 6 and all(bypassed)


@pytest.mark.parametrize("position", ["before_token", "at_token"])
def test_narrow_vectors_are_the_first_components_scaled_and_stay_apart(
    queries: list[Query], tmp_path: Path, position: PoolingPosition
) -> None:
    model = both_routes(random_model(pooling_position=position), queries)
    with pytest.raises(InputError, match=r"have 48 .* cannot be cut to 16: its traceir.json names no shorter width"):
        Encoder(model, dim=16)
    model.settings = replace(model.settings, matryoshka_dims=(48, 16), closing="then")
    whole, narrow = Encoder(model), Encoder(model, dim=16)
    items = [Item.of(text="red cube"), Item.of(image=image_of(3))]
    pairs = [(each.encode_queries(queries), each.encode_items(items)) for each in (whole, narrow)]
    for full, short in zip(*([*own, *others] for own, others in pairs), strict=True):
        assert short.vector == pytest.approx(full.vector[:16] / np.linalg.norm(full.vector[:16]), abs=1e-6)
        assert (short.route, short.reasoning) == (full.route, full.reasoning)
    assert (narrow.width, narrow.widths, whole.widths) == (16, (16,), (48, 16)) and narrow.fingerprint == whole.fingerprint
    assert (
        narrow.prompt_version == f"{whole.prompt_version}, first 16"
        and Encoder(model, dim=48).prompt_version == whole.prompt_version
    )
    for dim in (0, 17, 49):
        with pytest.raises(InputError, match=f"have 48 components and cannot be cut to {dim}: it was trained for 48, 16"):
            Encoder(model, dim=dim)
    for filled, other, remedy in ((narrow, whole, "--dim 16"), (whole, narrow, "--dim 48")):
        with open_index(tmp_path / remedy, filled, create=True) as index:
            Searcher(filled, index).add([Item.of(text="red", id="a")])
            assert f"first {filled.width}" in index.info().prompt_version or filled is whole
        with pytest.raises(StoreError, match=remedy):
            open_index(tmp_path / remedy, other)


def test_at_token_reads_one_state_later_and_last_never_writes(queries: list[Query]) -> None:
    before, at = (both_routes(random_model(pooling_position=position), queries) for position in ("before_token", "at_token"))
    for own, other in zip(Encoder(before).encode_queries(queries), Encoder(at).encode_queries(queries), strict=True):
        if not own.truncated and not other.truncated:
            assert own.reasoning == other.reasoning and float(own.vector @ other.vector) < 0.9999
    last = Encoder(random_model(pooling_position="last"))
    assert {encoding.route for encoding in last.encode_queries(queries)} == {"direct"}
    assert last.prompt_version == "brief-1, read last", "an index notices"


def test_threshold_is_a_latency_knob_and_wrong_options_are_refused(model: TraceModel, queries: list[Query]) -> None:
    def share(threshold: float) -> float:
        encodings = Encoder(model, threshold=threshold).encode_queries(queries)
        return sum(encoding.route == "direct" for encoding in encodings) / len(encodings)

    assert share(0.0) == 1.0 and share(1.0) <= share(0.5) <= share(0.05) < 1.0
    with pytest.raises(InputError, match="probability"):
        Encoder(model, threshold=1.5)
    with pytest.raises(InputError, match="sideways"):
        Encoder(model).encode_queries(queries, route="sideways")
    assert Encoder(model).encode_queries([]) == []


def test_why_a_row_stopped_short_is_told_and_the_closing_text_is_read(queries: list[Query]) -> None:
    mute = random_model(emb_scale=0.0)
    spent = Encoder(mute, max_reasoning_tokens=4).encode_queries(queries[:6])
    assert {(own.truncated, own.ended, own.tokens, own.route) for own in spent} == {(True, "budget", 4, "reason")}
    mute.settings = replace(mute.settings, closing="red cube")
    for before, after in zip(spent, Encoder(mute, max_reasoning_tokens=4).encode_queries(queries[:6]), strict=True):
        assert after.truncated and after.reasoning == before.reasoning and float(before.vector @ after.vector) < 0.9999
        assert float(after.vector @ after.vector) == pytest.approx(1.0, abs=1e-5)
    ending = random_model()
    with torch.no_grad():
        layout = ending.processor.lay_out(render_query(queries[0], "brief-1"))
        state = ending.hidden(ending.processor.collate([layout]))[0, -1]
        ending.network.lm_head.weight[ending.processor.emb_id] = -state
        ending.network.lm_head.weight[ending.processor.special[TURN_END]] = 9.0 * state
    (ended,) = Encoder(ending).encode_queries(queries[:1], route="reason")
    assert ended.truncated and ended.ended == "turn" and ended.tokens < Encoder(ending).budget


def test_candidates_never_reason_unless_their_model_was_trained_so(model: TraceModel) -> None:
    items = [Item.of(text="red cube"), Item.of(image=image_of(5)), Item.of(text="a", image=image_of(6))]
    assert {(encoding.route, encoding.reasoning) for encoding in Encoder(model).encode_items(items)} == {("direct", "")}
    writing = TraceModel(model.network, model.processor, replace(model.settings, candidates_write=True))
    assert "reason" in {encoding.route for encoding in Encoder(writing).encode_items(items)}


def test_eight_threads_share_one_model(model: TraceModel, queries: list[Query]) -> None:
    encoder = Encoder(model)
    alone = encoder.encode_queries(queries)
    with ThreadPoolExecutor(8) as pool:
        for encodings in pool.map(lambda _: encoder.encode_queries(queries), range(8)):
            assert all(alike(own, other) for own, other in zip(alone, encodings, strict=True))
