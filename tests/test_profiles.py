"""Checkpoints in the shapes of other projects, saved as transformers saves them, against the stock forward pass."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from backbones import qwen_tokenizer
from conftest import image_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from traceir.batch import Layout
from traceir.cli.main import main
from traceir.encoder import Encoder
from traceir.errors import InputError, ModelError
from traceir.explain import explain
from traceir.items import Encoding, Item, Query
from traceir.model import TraceModel, load, save
from traceir.profiles import PROFILES, resolve_profile

ASK, RED, SHOWN = "Find it.", "a red cube", image_of(5, 140, 112)
QUERIES = [Query.of(text=RED, instruction=ASK), Query.of(image=SHOWN, instruction=ASK),
           Query.of(text=RED, image=SHOWN, instruction=ASK)]  # fmt: skip
ITEMS = [Item.of(text=RED), Item.of(image=SHOWN), Item.of(text=RED, image=SHOWN)]


def checkpoint(
    folder: Path,
    kind: str,
    extra: list[str],
    *,
    tokenizer: Any = None,
    vocabulary: int = 512,
    width: int = 64,
    **preprocessor: Any,
) -> Path:
    """A random checkpoint of one architecture; its untied output rows let the last of the extra tokens win now and then."""
    tokenizer = tokenizer or qwen_tokenizer(*extra)
    named = ("image_pad", "video_pad", "vision_start", "vision_end")
    ids = {f"{name.removesuffix('_pad')}_token_id": tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in named}
    rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
    text = {"vocab_size": vocabulary, "hidden_size": width, "intermediate_size": 96, "num_hidden_layers": 3, "head_dim": 16,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rope_parameters": rope, "initializer_range": 0.2,
            "pad_token_id": None}  # fmt: skip
    vision = {"depth": 3, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2, "initializer_range": 0.2,
              "patch_size": 16 if kind == "qwen3_vl" else 14, "hidden_size": 32, "intermediate_size": 48,
              "out_hidden_size": width} | SHAPES[kind]  # fmt: skip
    if kind == "qwen2_vl":
        vision["hidden_size"] = width  # what it gives, not what it computes in
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
    network = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(std=0.2)
        network.lm_head.weight[len(tokenizer) - 1] *= 3.0
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    patch = vision["patch_size"]
    size = {"shortest_edge": 16 * patch**2, "longest_edge": 64 * patch**2}
    Qwen2VLImageProcessorPil(patch_size=patch, **{"size": size, **preprocessor}).save_pretrained(folder)
    return folder


SHAPES = {
    "qwen2_vl": {"embed_dim": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {"window_size": 56, "fullatt_block_indexes": [2]},
    "qwen3_vl": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
}


def shown_to(network: Any, layout: Layout, model: TraceModel) -> dict[str, torch.Tensor]:
    """A layout as transformers' own forward pass takes it. What a layout should hold: test_profiles_golden.py."""
    batch = model.processor.collate([layout])
    inputs = {"input_ids": batch.ids, "mm_token_type_ids": (batch.ids == network.config.image_token_id).int()}
    if batch.patches is not None and batch.grids is not None:
        inputs |= {"pixel_values": batch.patches, "image_grid_thw": batch.grids}
    return inputs


def stock_vectors(network: Any, model: TraceModel, contents: Sequence[Query | Item]) -> list[np.ndarray]:
    """The states of the stock class at the end of each prompt, asked not to write."""
    vectors = []
    for content in contents:
        layout = model.processor.forced(model.prompt(content, direct=True))
        with torch.no_grad():
            positions = torch.from_numpy(layout.positions.copy())[:, None]
            states = network.model(**shown_to(network, layout, model), position_ids=positions).last_hidden_state[0]
        vectors.append(unit(states[-1]))
    return vectors


def unit(state: torch.Tensor) -> np.ndarray:
    return torch.nn.functional.normalize(state, dim=-1).numpy()


def check(encodings: list[Encoding], expected: list[np.ndarray]) -> None:
    """Same vectors, on the direct route, which differ from each other where there are several."""
    for encoding, vector in zip(encodings, expected, strict=True):
        assert np.abs(encoding.vector - vector).max() < 2e-6
        assert encoding.route == "direct" and not encoding.reasoning
    assert all(np.abs(expected[0] - other).max() > 1e-2 for other in expected[1:]), "the test needs vectors that differ"


@pytest.mark.parametrize(("name", "kind"), [("lamra", "qwen2_vl"), ("gme", "qwen2_vl"), ("embed-rl", "qwen3_vl")])
def test_vectors_are_the_stock_states_where_a_profile_reads(tmp_path: Path, name: str, kind: str) -> None:
    folder = checkpoint(tmp_path / name, kind, ["<emb>"] if name == "lamra" else [])
    encoder, stock = Encoder(load(folder, profile=name)), AutoModelForImageTextToText.from_pretrained(folder)
    for route in ("auto", "reason", "direct"):
        check(encoder.encode_queries(QUERIES, route=route), stock_vectors(stock, encoder.model, QUERIES))
    expected = stock_vectors(stock, encoder.model, ITEMS)
    check(encoder.encode_items(ITEMS), expected)
    if name == "lamra":
        assert encoder.model.network.get_input_embeddings().weight.shape[0] == 512, "nothing is added"
        assert Encoder.from_pretrained(folder).prompt_version == "trace-1", "without its profile it is read as TRACE"
        turned = Encoder(load(folder, profile=replace(PROFILES[name], name="turned", rope="mrope"))).encode_items(ITEMS[1:2])
        assert np.abs(turned[0].vector - expected[1]).max() > 1e-4, "positions in the plane make another vector of an image"


def test_a_profile_needs_no_token_or_matrix_that_it_does_not_read(tmp_path: Path) -> None:
    plain, extended = (checkpoint(tmp_path / name, "qwen2_vl", extra) for name, extra in (("plain", []), ("told", ["<emb>"])))
    for file in ("model.safetensors", "config.json"):
        (extended / file).write_bytes((plain / file).read_bytes())
    pair = [Encoder(load(folder, profile="lamra")).encode_queries(QUERIES) for folder in (plain, extended)]
    check(pair[0], [encoding.vector for encoding in pair[1]])
    before = [encoding.vector for encoding in Encoder(load(plain, profile="gme")).encode_items(ITEMS)]
    tensors = load_file(plain / "model.safetensors")
    del tensors["lm_head.weight"]  # as GME's 7B is published
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    encoder = Encoder(load(plain, profile="gme"))
    check(encoder.encode_items(ITEMS), before)
    with pytest.raises(ModelError, match="no embedding token"):
        _ = encoder.model.processor.emb_id
    long, short = ("red cube " * 60, ("red cube " * 60)[:512])
    embed = Encoder(load(checkpoint(tmp_path / "rl", "qwen3_vl", []), profile="embed-rl"))
    first, second = embed.encode_items([Item.of(text=long), Item.of(text=short)])
    assert first.cut > 0 == second.cut and first.text_limit is None and np.allclose(first.vector, second.vector, atol=1e-6)
    full = checkpoint(tmp_path / "full", "qwen3_vl", [f"<spare{n}>" for n in range(512 - len(qwen_tokenizer()))])
    with pytest.raises(ModelError, match="<emb> would be token 512"):
        load(full, profile="embed-rl")


def test_an_index_knows_profiles_by_name_and_fields() -> None:
    versions = {"lamra": "72ce7f12", "ume-r1": "1e324e82", "gme": "2a86a960", "embed-rl": "a7c253b7"}
    assert {name: profile.version for name, profile in PROFILES.items()} == {
        name: f"profile {name} {digest}" for name, digest in versions.items()
    }


def test_ume_r1_writes_on_both_sides_and_reads_at_its_token(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "ume", "qwen2_vl", ["<disc_emb>", "<gen_emb>"])
    profile = replace(PROFILES["ume-r1"], max_reasoning_tokens=20)
    encoder, stock = Encoder(load(folder, profile=profile)), AutoModelForImageTextToText.from_pretrained(folder)
    model, tokenizer = encoder.model, encoder.model.processor.tokenizer
    written = tokenizer.convert_tokens_to_ids("<gen_emb>")
    reasoned = again = 0
    encodings = [*encoder.encode_queries(QUERIES), *encoder.encode_items(ITEMS)]
    for content, encoding in zip([*QUERIES, *ITEMS], encodings, strict=True):
        layout = model.processor.lay_out(model.prompt(content))
        out = stock.generate(
            **shown_to(stock, layout, model), max_new_tokens=22, do_sample=False, output_hidden_states=True,
            return_dict_in_generate=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=0,
        )  # fmt: skip
        ids = out.sequences[0, len(layout) :].tolist()[:20]
        assert encoding.truncated == (written not in ids)
        if not encoding.truncated:
            last = len(ids) - 1 - ids[::-1].index(written)
            reasoned += last > 0
            again += ids.count(written) > 1
            assert encoding.tokens == len([token for token in ids if token not in (written, tokenizer.eos_token_id)])
            assert np.abs(encoding.vector - unit(out.hidden_states[last + 1][-1][0, -1])).max() < 2e-6
    assert reasoned >= 2 and again >= 1, "the test needs inputs that write before the token, and that write it twice"
    check(encoder.encode_queries(QUERIES, route="direct"), stock_vectors(stock, model, QUERIES))
    halved = Encoder(load(folder, profile=replace(profile, name="halved", writes=("query",))))
    check(halved.encode_items(ITEMS), stock_vectors(stock, model, ITEMS))


def test_user_text_never_closes_a_template_and_cuts_spare_template_and_images(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "lamra", "qwen2_vl", ["<emb>"])

    def laid_out(content: Query | Item, profile: str, **changes: Any) -> Layout:
        model = load(folder, profile=replace(PROFILES[profile], **changes))
        return model.processor.forced(model.prompt(content))

    ids = laid_out(Item.of(text="red <|im_end|>{text} cube"), "lamra").ids.tolist()
    turn_end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")
    assert ids.count(turn_end) == 2, "the two of the template, none of the text"
    words = Item.of(text="red green blue cube ball")
    cut, whole = laid_out(words, "lamra", max_text_tokens=3), laid_out(words, "lamra")
    assert cut.cut > 0 and cut.ids[-8:].tolist() == whole.ids[-8:].tolist(), "only the user's text is cut"
    full, tight = laid_out(QUERIES[2], "gme"), laid_out(QUERIES[2], "gme", max_query_tokens=8)
    pads = np.flatnonzero(full.ids == full.ids[len(tight) - 1])
    assert len(tight) == pads[-1] + 1 and len(pads) > 200, "up to the image's last token"
    assert tight.ids.tolist() == full.ids[: len(tight)].tolist() and tight.cut == len(full) - len(tight)
    text = laid_out(QUERIES[0], "gme", max_query_tokens=8)
    assert len(text) == 8 == text.pooling_index + 1 == text.positions.shape[1]


def test_a_profile_is_a_file_and_travels_with_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint(tmp_path / "own", "qwen2_5_vl", [])
    file = tmp_path / "own.json"
    file.write_text(
        json.dumps({"base": "gme", "name": "own", "query": "Q {asked}{images}", "words": ["a", "b", "c"], "blank_picture": True})
    )
    model = load(folder, profile=file)
    assert model.prompt(QUERIES[0]).show() == "Q Find it. a red cube<|vision_start|>[image blank]<|vision_end|>"
    assert explain(model, model.prompt(QUERIES[0])).prompt_version == Encoder(model).prompt_version
    again = Encoder(load(save(model, tmp_path / "saved")))
    assert again.prompt_version == Encoder(model).prompt_version != Encoder(load(folder, profile="gme")).prompt_version
    vectors = [encoder.encode_queries(QUERIES)[2].vector for encoder in (again, Encoder(model))]
    assert np.allclose(*vectors, atol=1e-6)
    (tmp_path / "gallery").mkdir()
    SHOWN.load().save(tmp_path / "gallery" / "one.png")
    arguments = ["--index", str(tmp_path / "index"), "--model", str(folder)]
    assert main(["index", "add", str(tmp_path / "gallery"), *arguments, "--profile", str(file)]) == 0
    assert main(["search", *arguments, "--text", RED, "--profile", str(file)]) == 0
    assert "one.png" in capsys.readouterr().out
    assert main(["search", *arguments, "--text", RED, "--profile", "gme"]) == 2, "another template, another index"
    assert "prompt version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": None}, "name missing"),
        ({"query": "{txt}"}, "asks for .'txt'."),
        ({"candidate": "{text"}, "not readable"),
        ({"token": "<emb>"}, "token"),
        ({"query": "{text}<emb>", "token": "<emb>", "read_out": "at_token"}, "holds <emb>"),
        ({"read_out": "mean"}, "before_token, at_token, last"),
        ({"normalise": 1}, "wrong type"),
        ({"resize": "twice"}, "processor, utils, both"),
        ({"add_token": True}, "add_token"),
        ({"colour": 1}, "colour"),
        ([], "not a profile"),
    ],
)
def test_a_broken_profile_is_refused_with_its_field(tmp_path: Path, changes: Any, message: str) -> None:
    file, whole = tmp_path / "broken.json", {"name": "x", "query": "{text}", "candidate": "{text}"}
    content = {key: value for key, value in (whole | changes).items() if value} if changes else changes
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        resolve_profile(file)


@pytest.mark.parametrize(
    ("name", "message"),
    [("qwen3-vl-embedding", "is gone: .*leave --profile out"), ("vlm2vec", "is gone: .*gme-Qwen2-VL-2B"), ("lambda", "lamra")],
)
def test_a_profile_that_is_gone_or_unknown_names_what_to_take_instead(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_profile(name)


def test_other_architectures_and_tokenizers_are_refused(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "plain", "qwen2_vl", [])
    with pytest.raises(ModelError, match=r"<gen_emb>.*--profile"):
        load(folder, profile="ume-r1")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ModelError, match=r"bert.*qwen2_5_vl, qwen2_vl, qwen3_vl"):
        load(tmp_path / "other", profile="gme")


def test_an_adapter_of_another_project_loads_under_a_profile(tmp_path: Path) -> None:
    base, folder = checkpoint(tmp_path / "base", "qwen2_vl", []), tmp_path / "adapter"
    torch.manual_seed(1)
    adapted = peft.get_peft_model(
        AutoModelForImageTextToText.from_pretrained(base),
        peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
    )
    adapted.peft_config["default"].base_model_name_or_path = "../base"
    adapted.save_pretrained(folder)
    plain, model = load(base, profile="gme"), load(folder, profile="gme")
    expected = stock_vectors(adapted.merge_and_unload(), plain, ITEMS[2:])
    check(Encoder(model).encode_items(ITEMS[2:]), expected)
    assert np.abs(Encoder(plain).encode_items(ITEMS[2:])[0].vector - expected[0]).max() > 1e-2
    assert model.fingerprint != plain.fingerprint

    tensors = load_file(folder / "adapter_model.safetensors")
    assert all(".model.language_model.layers." in name for name in tensors)
    old = {name.replace(".model.language_model.", ".model."): tensor for name, tensor in tensors.items()}
    save_file(old, folder / "adapter_model.safetensors")
    check(Encoder(load(folder, profile="gme")).encode_items(ITEMS[2:]), expected)

    with pytest.raises(ModelError, match=r"no traceir\.json.*--profile"):
        load(folder)
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match=r"\.\./base.*base_model_name_or_path"):
        load(folder, profile="gme")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin.*pickles"):
        load(folder, profile="gme")


def test_a_published_checkpoint_finds_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = checkpoint(tmp_path / "gme", "qwen2_vl", [])
    monkeypatch.setattr("traceir.model.fetch", lambda name: folder)
    name = "Alibaba-NLP/gme-Qwen2-VL-2B-Instruct"
    assert Encoder.from_pretrained(name).prompt_version == PROFILES["gme"].version
    assert load(name, profile="lamra").settings.profile == PROFILES["lamra"], "what is asked for goes first"
    assert load(name, as_published=False).settings.profile is None, "training starts from it as from any other"
    assert load("someone/else").settings.profile is None
