"""Items and queries: what stands for an image, what is refused, and the names that `import traceir` gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import image_of

import traceir
from traceir.errors import ImageError, InputError
from traceir.images import ImageInput
from traceir.items import ROUTES, Content, Item, Query, check_route


@pytest.mark.parametrize("kind", [Item, Query])
def test_a_path_is_opened_and_never_read_as_words(kind: type[Item] | type[Query], tmp_path: Path) -> None:
    file = tmp_path / "cat.png"
    image_of(1).load().save(file)
    shown = ImageInput.open(file)
    for image in (str(file), file, file.read_bytes(), bytearray(file.read_bytes()), shown):
        made = kind.of(image=image, text="a cat")
        assert made.modality == "image,text" and made.text == "a cat" and made.images == (shown,)
        assert made.content_hash() == kind.of(image=shown, text="a cat").content_hash()
    assert kind(["a", shown]).parts == ("a", shown)
    with pytest.raises(ImageError, match="does not exist"):
        kind.of(image=str(tmp_path / "missing.png")).content_hash()
    pixels = kind.of(image=image_of(1).load())
    np.testing.assert_array_equal(np.asarray(pixels.images[0].load()), np.asarray(shown.load()))


@pytest.mark.parametrize(
    ("error", "reason", "kind", "content"),
    [
        *(
            (TypeError, type(wrong).__name__, Query, {"image": wrong})
            for wrong in (np.zeros((4, 4, 3)), 7, ["a.png"], {"path": 1})
        ),
        (ImageError, "address", Item, {"image": "https://example.org/cat.png"}),
        (ImageError, "not a file name", Item, {"image": ""}),
        (TypeError, r"Query\.of", Query, "a red ring"),
        (TypeError, "part 1 is a PosixPath", Item, ("a red ring", Path("cat.png"))),
        (TypeError, "text is a PosixPath", Item, {"text": Path("a")}),
        (TypeError, "instruction is a list", Query, {"text": "a", "instruction": ["b"]}),
        (InputError, "empty", Item, {"text": " "}),
        (InputError, "empty", Query, {"instruction": " "}),
        (InputError, "did you mean 'image'", Query, {"text": "x", "target": "picture"}),
    ],
)
def test_what_is_no_content_or_route_is_refused(error: type[Exception], reason: str, kind: type[Content], content: Any) -> None:
    with pytest.raises(error, match=reason):
        _ = kind.of(**content) if isinstance(content, dict) else kind(content)
    assert [check_route(route) for route in ROUTES] == list(ROUTES)
    with pytest.raises(InputError, match=r"route 'dierct' is unknown.*direct.*choose one of auto, reason, direct"):
        check_route("dierct")


def test_import_traceir_gives_the_names_and_costs_nothing() -> None:
    for name in traceir.__all__:
        assert name in dir(traceir) and callable(getattr(traceir, name))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = traceir.no_such_name
    with pytest.warns(DeprecationWarning, match="ImageInput"):
        assert traceir.Picture is ImageInput
    script = "import sys, traceir; print({'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules))"
    script += "; import traceir.images, traceir.index, traceir.retrieval.search, traceir.collection.ingest"
    script += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\nFalse\n"
