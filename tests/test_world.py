"""What a miniature knows, and that it says so, once, wherever it is used on anything else."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest
from conftest import image_of
from fake_sglang import serving_here

from traceir.checkpoint import bundled_model
from traceir.cli import main as cli
from traceir.encoder import Encoder
from traceir.errors import ModelError
from traceir.items import Item, Query
from traceir.model import load, save
from traceir.world import INSTEAD, World, world_of

CAPTION = "On the left a white ring, in the middle a blue ring, on the right a purple ring."


def test_words_and_the_size_of_images_are_the_bounds(encoder: Encoder, folder: Path) -> None:
    world = encoder.world
    assert world is not None
    drawing = next((folder / "mbeir_images").rglob("*.jpg"))
    for known in (Query.of(text=CAPTION), Query.of(image=drawing), Item.of(image=drawing, text="Make it yellow, then 3.")):
        assert world.knows(known)
    for strange in (Query.of(text="a giraffe"), Query.of(image=image_of(0)), Item.of(image=drawing, text="a giraffe, left")):
        assert not world.knows(strange)
    assert world.knows_kept(CAPTION, str(drawing)) and not world.knows_kept("a giraffe", None)
    assert world.knows_kept(None, "/nowhere/at-all.jpg"), "a picture that is gone is told of by whoever needs it"


def test_a_checkpoint_keeps_its_world(tmp_path: Path, encoder: Encoder) -> None:
    assert load(save(load(bundled_model()), tmp_path / "copy")).settings.world == encoder.world
    assert world_of("It knows little.", "here") == World("It knows little.")
    assert world_of(None, "here") is world_of("", "here") is None
    with pytest.raises(ModelError, match=r"there: world is .*\bsays\b"):
        world_of({"words": "a b"}, "there")


def test_index_search_and_server_say_it_once_with_the_commands_that_help(
    encoder: Encoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, index = tmp_path / "photos", tmp_path / "index"
    photos.mkdir()
    for number in range(2):
        image_of(number, 60, 40).load().save(photos / f"{number}.png")
    assert cli.main(["index", "add", str(photos), "--index", str(index)]) == 0
    shown = capsys.readouterr().err
    assert shown.count("note: The bundled model is a miniature") == 1
    assert all(command in shown for command in INSTEAD)
    assert cli.main(["search", CAPTION, "--index", str(index), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err.count("note:") == 1 and json.loads(out)["note"] in err
    with serving_here(index, encoder) as url, httpx.Client(base_url=url) as http:
        answer = http.post("/search", json={"text": CAPTION})
        assert answer.status_code == 200 and INSTEAD[0] in answer.json()["note"]
        config = http.get("/page/config").json()
    assert config["instead"] == list(INSTEAD) and config["instructions"] == []
    assert config["examples"] == []


def test_nothing_is_said_of_its_own_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, index = folder / "few.jsonl", str(tmp_path / "index")
    lines = (folder / "cand_pool" / "local" / "mbeir_mscoco_task0_test_cand_pool.jsonl").read_text().splitlines()[:4]
    pool.write_text("\n".join(lines) + "\n")
    assert cli.main(["index", "add", str(pool), "--index", index]) == 0
    assert cli.main(["search", CAPTION, "--index", index, "--json"]) == 0
    out, err = capsys.readouterr()
    assert "note:" not in err and '"note": null' in out
    assert cli.main(["search", "a giraffe", "--index", index]) == 0
    assert "note: The bundled model" in capsys.readouterr().err
