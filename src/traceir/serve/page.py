"""The page's files, and what it shows before the first search."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final

from traceir.errors import InputError
from traceir.image_formats import FORMATS, SUFFIXES
from traceir.index.store import Index, Stored
from traceir.items import MODALITIES, Modality
from traceir.outside import lines_of
from traceir.serve.schemas import CutoffConfig, FacetOut, FacetsOut, ModelOut, PageConfig, PageExample, PicturesConfig
from traceir.serve.uploads import LIMITS
from traceir.world import INSTEAD, World

STATIC: Final = Path(__file__).parent / "static"
BUNDLED: Final[dict[str, Any]] = json.loads(STATIC.with_name("page.json").read_text(encoding="utf-8"))
"""Instructions of the bundled model's training, and examples over its own data; a larger model takes any words."""
LONGEST: Final = 2000  # characters of an instruction, as in the page's own field
MOST: Final = 200  # instructions that a page suggests
LOOKED_AT: Final = 64  # items from which a collection is judged and its examples are chosen
WORDS: Final = 12  # of a text that is an example
FACETS: Final = 12  # values of each field to choose from
TENANTS: Final = 256  # whose facets are kept at a time
PICTURES: Final = PicturesConfig(
    types={known.media_type: name for name, known in FORMATS.items()}, suffixes=sorted(SUFFIXES), most_bytes=LIMITS.file_bytes
)


def read_instructions(path: Path) -> tuple[str, ...]:
    """The suggestions of a UTF-8 text file, one a line, in its order; blank lines and repetitions are left out.

    InputError where the file cannot be read, is not plain text, holds none, more than MOST, or one over LONGEST characters.
    """
    lines = [line.strip() for line in lines_of(path, "instruction")]
    for number, line in enumerate(lines, start=1):
        if any(unicodedata.category(char) == "Cc" and char != "\t" for char in line):
            raise InputError(f"{path}:{number}: there is a control character; give plain text, one instruction a line")
        if len(line) > LONGEST:
            raise InputError(f"{path}:{number}: the instruction has {len(line)} characters; give at most {LONGEST}")
    instructions = tuple(dict.fromkeys(filter(None, lines)))
    if not instructions:
        raise InputError(f"{path} holds no instruction; write one a line, or leave --instructions out")
    if len(instructions) > MOST:
        raise InputError(f"{path} holds {len(instructions)} instructions; give at most {MOST}")
    return instructions


def page_config(
    title: str, model: ModelOut, counts: Mapping[Modality, int], kept: Sequence[Stored], *, world: World | None = None,
    instructions: Sequence[str] | None = None, reasons: bool = True, cutoff: CutoffConfig | None = None,
) -> PageConfig:  # fmt: skip
    """What the page begins with. `kept` are some items of the collection, `instructions` those of whoever runs the server.

    Our own instructions and examples belong to the bundled model over its own data; any other collection suggests itself.
    """
    at_home = world is not None and all(world.knows_kept(item.text, item.image) for item in kept)
    ours = at_home and instructions is None
    examples = [PageExample(**example) for example in BUNDLED["examples"]] if ours and kept else examples_of(kept)
    return PageConfig(
        title=title, instructions=list(instructions or (BUNDLED["instructions"] if ours else ())), modalities=list(MODALITIES),
        model=model, count={str(name): count for name, count in counts.items()}, examples=examples,
        world=world.says if world else "", reasons=reasons, instead=list(INSTEAD) if world and not at_home else [],
        cutoff=cutoff or CutoffConfig(default=None, background={}), fold=world is None, pictures=PICTURES,
    )  # fmt: skip


@dataclass(slots=True)
class FacetCache:
    """The facets of each tenant's part of an index, as JSON of a FacetsOut, for as long as the index stays as it is."""

    kept: dict[str | None, tuple[str, str]] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)  # so that who asks together does not count side by side

    def of(self, tenant: str | None, index: Index) -> str:
        with self.lock:
            version = index.version()
            if (known := self.kept.get(tenant)) is None or known[0] != version:
                if len(self.kept) > TENANTS:
                    self.kept.clear()
                facets = [FacetOut(**asdict(facet)) for facet in index.facets(limit=FACETS)]
                self.kept[tenant] = known = version, FacetsOut(facets=facets).model_dump_json()
            return known[1]


def examples_of(kept: Sequence[Stored], most: int = 2) -> list[PageExample]:
    """Queries that a collection suggests: the first words of some of its texts. Its images the page shows by itself."""
    texts = [item.text for item in kept if item.text]
    chosen = texts[:: -(-len(texts) // most) or 1]
    return [PageExample(title="in these words", text=" ".join(text.split()[:WORDS])) for text in chosen]
