"""Published models that are known: how each is read here, what it takes, and what of that was verified how.

Sizes, widths and licences are those of mteb 2.26.24's model cards and of the models' own pages on the hub; sizes of networks over
Qwen were counted on transformers' classes with their published configurations. What no source said is None. Imports no torch.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Final

BYTES: Final = 2
"""Of a parameter in bfloat16."""
_GOLDEN: Final = "golden test: token ids, positions, grids and pixels of twelve inputs as the project's own code has them"
_LIBRARY: Final = "its library's own vectors, on a small random checkpoint of its class"
_OWN: Final = "the forward pass of transformers, on a small random checkpoint of its class"
_START: Final = "untrained for retrieval: a start for training"
_ALL: Final = ("text", "image", "image,text")
_ONE: Final = ("text", "image")


@dataclass(frozen=True, slots=True)
class Known:
    """One published model.

    `road`: `profile NAME`, `sentence-transformers` (by its own files), or `trace` (TRACE's prompts). `modalities` of one input;
    a model without `image,text` takes no input of both. `verified` says what was compared with what; nowhere the published
    weights, which were not at hand.
    """

    id: str
    road: str
    parameters: int
    width: int
    licence: str | None
    modalities: tuple[str, ...]
    verified: str
    reasons: bool = False
    note: str = ""

    @property
    def memory(self) -> int:
        """Bytes of the weights alone in bfloat16; float32, the default, takes twice as many."""
        return self.parameters * BYTES

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "memory": self.memory}


KNOWN: Final = (
    Known("bundled", "trace", 1_397_536, 128, "apache-2.0", _ALL, "trained and evaluated here (docs/evidence.md)", True,
          "taken where no --model is given; knows MiniBEIR's drawn world alone"),
    Known("sentence-transformers/clip-ViT-B-32", "sentence-transformers", 151_277_313, 512, None, _ONE, _LIBRARY),
    Known("google/siglip2-base-patch16-224", "sentence-transformers", 375_187_970, 768, "apache-2.0", _ONE, _LIBRARY,
          note="has no modules.json: --model st:google/siglip2-base-patch16-224"),
    Known("google/embeddinggemma-2", "sentence-transformers", 744_371_992, 768, "apache-2.0", _ALL, "nothing: not run",
          note="also reads sound and video; the first 512, 256 or 128 components do alone"),
    Known("google/embeddinggemma-300m", "sentence-transformers", 307_581_696, 768, "gemma", ("text",), _LIBRARY,
          note="the first 512, 256 or 128 components do alone"),
    Known("Qwen/Qwen3-VL-Embedding-2B", "sentence-transformers", 2_127_532_032, 2048, "apache-2.0", _ALL, _LIBRARY,
          note="the first 64 components and more do alone"),
    Known("Qwen/Qwen3-VL-Embedding-8B", "sentence-transformers", 8_144_793_840, 4096, "apache-2.0", _ALL, _LIBRARY,
          note="the first 64 components and more do alone"),
    Known("Alibaba-NLP/gme-Qwen2-VL-2B-Instruct", "profile gme", 2_208_985_600, 1536, "apache-2.0", _ALL, _GOLDEN),
    Known("Alibaba-NLP/gme-Qwen2-VL-7B-Instruct", "profile gme", 8_291_375_616, 3584, "apache-2.0", _ALL, _GOLDEN),
    Known("code-kunkun/LamRA-Ret", "profile lamra", 8_291_375_616, 3584, None, _ALL, _GOLDEN),
    Known("code-kunkun/LamRA-Ret-Pretrained", "profile lamra", 8_291_375_616, 3584, None, _ALL, _GOLDEN,
          note="trained on texts alone"),
    Known("zhibinlan/UME-R1-2B", "profile ume-r1", 2_208_985_600, 1536, "apache-2.0", _ALL, _GOLDEN, True),
    Known("zhibinlan/UME-R1-7B", "profile ume-r1", 8_291_375_616, 3584, "apache-2.0", _ALL, _GOLDEN, True),
    Known("ZoengHouNaam/Embed-RL-2B", "profile embed-rl", 2_127_532_032, 2048, None, _ALL, _GOLDEN,
          note="its reasoner is a model of its own, which is not run"),
    Known("ZoengHouNaam/Embed-RL-4B", "profile embed-rl", 4_437_815_808, 2560, None, _ALL, _GOLDEN,
          note="its reasoner is a model of its own, which is not run"),
    Known("Qwen/Qwen2-VL-2B-Instruct", "trace", 2_208_985_600, 1536, "apache-2.0", _ALL, _OWN, note=_START),
    Known("Qwen/Qwen2.5-VL-3B-Instruct", "trace", 3_754_622_976, 2048, "qwen-research", _ALL, _OWN, note=_START),
    Known("Qwen/Qwen2.5-VL-7B-Instruct", "trace", 8_292_166_656, 3584, "apache-2.0", _ALL, _OWN, note=_START),
    Known("Qwen/Qwen3-VL-2B-Instruct", "trace", 2_127_532_032, 2048, "apache-2.0", _ALL, _OWN, note=_START),
    Known("Qwen/Qwen3-VL-4B-Instruct", "trace", 4_437_815_808, 2560, None, _ALL, _OWN, note=_START),
    Known("Qwen/Qwen3-VL-8B-Instruct", "trace", 8_767_123_696, 4096, "apache-2.0", _ALL, _OWN, note=_START),
)  # fmt: skip


def profile_for(hub_id: str) -> str | None:
    """The name of the profile that a published checkpoint is read by; None for one that needs none, or is not known."""
    roads = {one.id.lower(): one.road for one in KNOWN}
    kind, _, name = roads.get(hub_id.lower(), "").partition(" ")
    return name if kind == "profile" else None


def described() -> str:
    """The list for a terminal."""
    return "\n".join(_described(one) for one in KNOWN)


def _described(one: Known) -> str:
    sizes = f"{_short(one.parameters)} parameters, {_short(one.memory)}B in bfloat16, width {one.width}"
    takes = " | ".join(one.modalities) + ("; may reason" if one.reasons else "")
    lines = [
        f"{one.road}; {sizes}; licence {one.licence or 'not known'}",
        f"takes {takes}",
        one.note,
        f"verified: {one.verified}",
    ]
    return "\n    ".join([one.id, *filter(None, lines)])


def _short(number: int) -> str:
    """Three digits with G (10^9) or M (10^6)."""
    return f"{number / 1e9:.3g} G" if number >= 1e9 else f"{number / 1e6:.3g} M"
