"""Items and queries: what stands for a picture, what is refused, and the names that `import traceir` gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import picture
from fakes import FakeEncoder

import traceir
from traceir.errors import ImageError, InputError
from traceir.images import ImageInput
from traceir.items import ROUTES, Content, Item, Query, check_route
from traceir.search import Searcher


@pytest.mark.parametrize("kind", [Item, Query])
def test_field_report_12_a_path_is_opened_and_never_read_as_words(kind: type[Item] | type[Query], tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    picture(1).load().save(file)
    shown = ImageInput.open(file)
    for image in (str(file), file, file.read_bytes(), bytearray(file.read_bytes()), shown):
        made = kind.of(image=image, text="a cat")
        assert made.modality == "image,text" and made.text == "a cat"
        assert made.images == (shown,)
        assert made.content_hash() == kind.of(image=shown, text="a cat").content_hash()
    pixels = kind.of(image=picture(1).load())
    np.testing.assert_array_equal(np.asarray(pixels.images[0].load()), np.asarray(shown.load()))


def test_field_report_12_what_is_no_image_is_refused(tmp_path: Path) -> None:
    for wrong in (np.zeros((4, 4, 3)), 7, ["cat.png"], {"path": "cat.png"}):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            Query.of(image=wrong)
    with pytest.raises(ImageError, match="address"):
        Item.of(image="https://example.org/cat.png")
    with pytest.raises(ImageError, match="does not exist"):
        Item.of(image=str(tmp_path / "missing.png")).content_hash()
    with pytest.raises(ImageError, match="not a file name"):
        Item.of(image="")


def test_field_report_12_parts_are_texts_and_images_alone(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"Query\.of"):
        Query("a red ring")
    with pytest.raises(TypeError, match="part 1 is a PosixPath"):
        Item(("a red ring", tmp_path / "cat.png"))
    with pytest.raises(TypeError, match="part 0 is a Image"):
        Query((picture(1).load(),))
    with pytest.raises(TypeError, match="text is a PosixPath"):
        Item.of(text=tmp_path)
    with pytest.raises(TypeError, match="instruction is a list"):
        Query.of(text="a", instruction=["b"])
    assert Query(["a", picture(1)]).parts == Query(("a", picture(1))).parts
    assert isinstance(Query.of(text="a"), Content)
    with pytest.raises(InputError, match="empty"):
        Item.of(text=" ")


def test_field_report_26_import_traceir_gives_the_names_and_costs_nothing() -> None:
    for name in ("Encoder", "Item", "Query", "ImageInput", "Searcher", "open_index", "Client"):
        assert name in traceir.__all__ and name in dir(traceir) and callable(getattr(traceir, name))
    assert all(getattr(traceir, name) is not None for name in traceir.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = traceir.no_such_name
    script = "import sys, traceir; print(sorted({'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_field_report_26_what_is_added_is_found_by_words(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    with traceir.open_index(tmp_path / "index", encoder, create=True) as index:
        searcher = Searcher(encoder, index)
        searcher.add([Item.of(text=f"thing {number}", id=f"t{number}") for number in range(5)])
        searcher.add([])
        assert searcher.search("thing 3", k=1).hits[0].id == "t3"
        with pytest.raises(InputError, match="id"):
            searcher.add([Item.of(text="no id")])
    with traceir.open_index(tmp_path / "index") as looked_at:
        assert looked_at.info().count == 5


def test_a_route_is_checked_in_one_place() -> None:
    assert [check_route(route) for route in ROUTES] == list(ROUTES)
    with pytest.raises(InputError, match=r"route 'dierct' is unknown.*direct.*choose one of auto, reason, direct"):
        check_route("dierct")
