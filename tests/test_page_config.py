"""What the page begins with, and its files, without a browser."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from traceir.cot.review.review_server import STATIC as REVIEW
from traceir.encoder import Encoder
from traceir.errors import InputError
from traceir.index.store import Stored
from traceir.serve.page import STATIC, page_config, read_instructions
from traceir.serve.schemas import ModelOut

MODEL = ModelOut(id="m", created=0, owned_by="o", fingerprint="f", prompt_version="p", width=8)


def kept(text: str | None, image: str | None = None) -> Stored:
    return Stored(f"{text} {image}", "text" if image is None else "image", text, image, {}, "hash")


def test_a_collection_suggests_itself_but_for_the_bundled_model_over_its_own(encoder: Encoder) -> None:
    photos = [kept(None, f"/photos/{number}.jpg") for number in range(5)]
    texts = [kept("A long walk along the river Elbe, written down on the evening of the same day by its author.")]
    for world in (None, encoder.world):
        strange = page_config("Own", MODEL, {"image": 5, "text": 1}, [*photos, *texts], world=world)
        asked = [example.text for example in strange.examples]
        assert asked == ["A long walk along the river Elbe, written down on the evening"] and strange.fold == (world is None)
        assert not strange.instructions and bool(strange.instead) == (world is not None)
    mini = page_config("Mini", MODEL, {"text": 1}, [kept("On the left a white ring.")], world=encoder.world)
    assert "Find the scene of this caption." in mini.instructions and "white ring" in str(mini.examples[0].text)
    assert mini.world and not mini.instead
    empty = page_config("Empty", MODEL, {}, [], world=encoder.world)
    assert not empty.examples and not empty.instead


def test_own_instructions_take_the_place_of_ours(tmp_path: Path) -> None:
    file = tmp_path / "instructions.txt"
    file.write_bytes("\ufeffFind the part.\r\n\r\n  ابحث عن الصورة \nFind the part.\n".encode())
    own = page_config("Parts", MODEL, {"text": 1}, [kept("a bolt")], instructions=read_instructions(file))
    assert own.instructions == ["Find the part.", "ابحث عن الصورة"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .*No such file"), (b" \n\n", "holds no instruction"),
        (b"Find it.\n\xff\xfe", r"not UTF-8 text \(byte 9\)"), (b"Find it.\nbell \x07 rings", ":2: there is a control character"),
        (b"one\n" + b"x" * 2001, ":2: the instruction has 2001 characters; give at most 2000"),
        (b"\n".join(b"Find %d." % number for number in range(201)), "holds 201 instructions; give at most 200"),
    ],
)  # fmt: skip
def test_bad_instruction_files_say_what_to_mend(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "instructions.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_instructions(file)


def test_the_files_of_both_pages_hold_nothing_that_the_policy_would_forbid() -> None:
    files = {file.name: file.read_text(encoding="utf-8") for folder in (STATIC, REVIEW) for file in folder.iterdir()}
    for name, text in files.items():
        addresses = set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]{2,}[\w./-]*", text)) - {"http://www.w3.org/2000/svg"}
        assert not addresses, (name, addresses)
        wrong = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|javascript:"
        assert not re.search(wrong, text), name
    html = files["index.html"] + files["review.html"]
    assert not re.search(r"\s(?:style|on\w+)=|<style|<script(?! type=\"module\" src=)", html)
    wanted = {*re.findall(r'"/?static/([\w.]+)"', html), *re.findall(r'from "\./([\w.]+)"', "".join(files.values()))}
    assert wanted <= files.keys() and {name for name in files if name.endswith(".js")} <= wanted
