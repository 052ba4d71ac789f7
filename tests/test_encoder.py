"""The adaptive encoder against plain `generate`, against itself one query at a time, and under threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import both_roads, picture, random_model

from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.items import Encoding, Item, Query
from traceir.model import TraceModel
from traceir.prompts import TURN_END, render_query


def generate_one(model: TraceModel, query: Query, budget: int) -> tuple[np.ndarray, list[int]]:
    """The reference: transformers' own generate, one query, the state that predicted `<|emb|>`."""
    batch = model.processor.collate([model.processor.lay_out(render_query(query, "brief-1"))])
    types = (batch.ids == model.network.config.image_token_id).int()
    shown = {"pixel_values": batch.patches, "image_grid_thw": batch.grids, "mm_token_type_ids": types}
    pictures = shown if batch.patches is not None else {}
    out = model.network.generate(
        input_ids=batch.ids, attention_mask=batch.mask, do_sample=False, **pictures,
        max_new_tokens=budget + 1, eos_token_id=model.processor.emb_id, pad_token_id=0,
        output_hidden_states=True, return_dict_in_generate=True,
    )  # fmt: skip
    written = out.sequences[0, batch.ids.shape[1] :].tolist()
    state = out.hidden_states[len(written) - 1][-1][0, -1]
    return torch.nn.functional.normalize(state, dim=-1).numpy(), written


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    return float(first @ second)


def test_auto_equals_generate_for_bypassed_and_reasoned_queries(model: TraceModel, queries: list[Query]) -> None:
    encodings = Encoder(model).encode_queries(queries)
    ended = 0
    for query, encoding in zip(queries, encodings, strict=True):
        vector, written = generate_one(model, query, 12)
        if written[-1] != model.processor.emb_id:
            assert encoding.truncated
            continue
        ended += 1
        assert encoding.tokens == len(written) - 1
        assert encoding.reasoning == model.processor.decode(written[:-1])
        assert cosine(encoding.vector, vector) > 0.99999
    assert ended >= 12
    assert {encoding.route for encoding in encodings} == {"direct", "reason"}, "the fixture must take both roads"
    assert {e.route == "direct" for e in encodings if e.tokens == 0} == {True}


@pytest.mark.parametrize("route", ["auto", "reason", "direct"])
def test_a_batch_equals_its_singles(model: TraceModel, queries: list[Query], route: str) -> None:
    encoder = Encoder(model, token_budget=300, decode_rows=5, batch_rows=7)
    together = encoder.encode_queries(queries, route=route)
    for query, encoding in zip(queries, together, strict=True):
        alone = encoder.encode_queries([query], route=route)[0]
        assert (alone.reasoning, alone.route, alone.truncated) == (
            encoding.reasoning, encoding.route, encoding.truncated)  # fmt: skip
        assert cosine(alone.vector, encoding.vector) > 0.99999
        assert abs(alone.emb_probability - encoding.emb_probability) < 1e-4


def test_direct_reads_the_prefill_and_reason_never_bypasses(model: TraceModel, queries: list[Query]) -> None:
    encoder = Encoder(model)
    auto, direct, reason = (encoder.encode_queries(queries, route=r) for r in ("auto", "direct", "reason"))
    assert all(e.route == "direct" and e.tokens == 0 for e in direct)
    assert all(e.route == "reason" and e.tokens > 0 for e in reason)
    for chosen, forced in zip(auto, direct, strict=True):
        if chosen.route == "direct":
            assert cosine(chosen.vector, forced.vector) > 0.99999


def test_threshold_is_a_latency_knob(model: TraceModel, queries: list[Query]) -> None:
    def share(threshold: float) -> float:
        found = Encoder(model, threshold=threshold).encode_queries(queries)
        return sum(e.route == "direct" for e in found) / len(found)

    assert share(0.0) == 1.0
    assert share(1.0) <= share(0.5) <= share(0.05) <= 1.0
    with pytest.raises(InputError, match="probability"):
        Encoder(model, threshold=1.5)


def test_the_budget_is_an_outcome_that_is_told(queries: list[Query]) -> None:
    mute = random_model(emb_scale=0.0)
    found = Encoder(mute, max_reasoning_tokens=4).encode_queries(queries[:6])
    assert all(e.truncated and e.tokens == 4 and e.route == "reason" for e in found)
    assert all(abs(np.linalg.norm(e.vector) - 1) < 1e-5 for e in found)


def test_field_report_24_an_end_of_the_turn_is_no_spent_budget(queries: list[Query]) -> None:
    model = random_model()
    with torch.no_grad():
        states = model.hidden(model.processor.collate([model.processor.lay_out(render_query(queries[0], "brief-1"))]))[0, -1]
        model.network.lm_head.weight[model.processor.emb_id] = -states
        model.network.lm_head.weight[model.processor.special[TURN_END]] = 9.0 * states
    (ended,) = Encoder(model).encode_queries(queries[:1], route="reason")
    assert ended.truncated and ended.ended == "turn" and ended.tokens < Encoder(model).budget
    spent = Encoder(random_model(), max_reasoning_tokens=4).encode_queries(queries, route="reason")
    assert {(one.truncated, one.ended) for one in spent} == {(True, "budget"), (False, None)}


def test_the_closing_text_is_read_before_a_truncated_embedding(queries: list[Query]) -> None:
    from dataclasses import replace

    mute = random_model(emb_scale=0.0)
    plain = Encoder(mute, max_reasoning_tokens=4).encode_queries(queries[:3])
    mute.settings = replace(mute.settings, closing="red cube")
    closed = Encoder(mute, max_reasoning_tokens=4).encode_queries(queries[:3])
    for query, before, after in zip(queries, plain, closed, strict=False):
        assert after.truncated and after.reasoning == before.reasoning
        assert cosine(before.vector, after.vector) < 0.9999
        ids = [*mute.processor.plain_ids(before.reasoning)]
        assert ids or query


def test_candidates_never_reason(model: TraceModel) -> None:
    found = Encoder(model).encode_items(
        [Item.of(text="red cube"), Item.of(image=picture(5)), Item.of(text="a", image=picture(6))]
    )
    assert all(e.route == "direct" and e.reasoning == "" for e in found)


def test_at_token_reads_one_state_later(queries: list[Query]) -> None:
    before = both_roads(random_model(), queries)
    at = both_roads(random_model(pooling_position="at_token"), queries)
    first, second = Encoder(before).encode_queries(queries), Encoder(at).encode_queries(queries)
    for one, other in zip(first, second, strict=True):
        if not one.truncated and not other.truncated:
            assert one.reasoning == other.reasoning
            assert cosine(one.vector, other.vector) < 0.9999
    direct = Encoder(at).encode_queries(queries, route="direct")
    for chosen, forced in zip(second, direct, strict=True):
        if chosen.route == "direct":
            assert cosine(chosen.vector, forced.vector) > 0.99999


def test_last_never_writes(queries: list[Query]) -> None:
    found = Encoder(random_model(pooling_position="last")).encode_queries(queries)
    assert all(e.route == "direct" for e in found)


def test_eight_threads_share_one_model(model: TraceModel, queries: list[Query]) -> None:
    encoder = Encoder(model)
    alone = encoder.encode_queries(queries)

    def again(_: int) -> list[Encoding]:
        return encoder.encode_queries(queries)

    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(again, range(8)):
            for one, other in zip(alone, found, strict=True):
                assert one.reasoning == other.reasoning
                assert cosine(one.vector, other.vector) > 0.99999


def test_an_unknown_route_is_refused(model: TraceModel, queries: list[Query]) -> None:
    with pytest.raises(InputError, match="sideways"):
        Encoder(model).encode_queries(queries, route="sideways")
    assert Encoder(model).encode_queries([]) == []
