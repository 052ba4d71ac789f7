"""Rerankers: query and candidate read together, for the best few that an index found.

    reranker = load_reranker("trace")
    ranked = rerank(reranker, query, [item_of(stored) for stored in kept])

Two kinds. A TRACE model, one prefill a candidate: how likely it is to describe it as the query's reasoning describes the target,
or whether it answers yes or no to query and candidate together. It may be the embedding model under an adapter, which leaves
that model's vectors and fingerprint as they are. Or any CrossEncoder of sentence-transformers, which scores as its own files
say. Higher is better; scores of two rerankers are not comparable.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from traceir.checkpoint import ADAPTER, CONFIG, PREFIX, bundled_model, fetch, plain_name, read_object
from traceir.errors import ImageError, InputError, ModelError
from traceir.images import ImageInput
from traceir.items import Item, Modality, Part, Query
from traceir.media.part import file_of
from traceir.prompts import TURN_END, render_query
from traceir.rerank_prompts import ANSWERS, DESCRIBE, RERANK, asked_to_describe, render_asked, render_offered

if TYPE_CHECKING:
    from traceir.batch import Layout
    from traceir.forward import TraceModel
    from traceir.index.store import ModelIdentity

log = logging.getLogger(__name__)

OWN: Final = "trace"
"""The name of the reranker that an encoder is itself."""
UNREADABLE: Final = -math.inf
"""The score of what a reranker cannot read: an image for one that reads texts alone, a file that is gone or broken."""
TEMPERATURE: Final = 0.04
"""Of the first stage's cosines, where the checkpoint names none: that of its training."""
AT_ONCE: Final = 8
"""Candidates between two looks at the clock, where there is a budget of seconds."""


class Reranker(Protocol):
    """Scores how well candidates answer a query. Thread-safe."""

    name: str

    def score(
        self, query: Query, items: Sequence[Item], *, reasoning: str = "", similarities: Sequence[float] | None = None
    ) -> list[float]:
        """One score an item, in order, higher is better; UNREADABLE for an item, or all, that it cannot read.

        `reasoning` is what the query's encoder wrote (Encoding.reasoning), `similarities` are the cosines of the first stage (the
        score "vector" of a Hit); those that have no use for them ignore them.
        """


class KeptParts(Protocol):
    """What an index keeps of an item (Stored, Hit), as far as a reranker needs it."""

    @property
    def id(self) -> str: ...
    @property
    def modality(self) -> Modality: ...
    @property
    def text(self) -> str | None: ...
    @property
    def image(self) -> str | None: ...


def item_of(stored: KeptParts) -> Item | None:
    """The item of an index again, by its text and image file; None where it has an image whose file is not there any more."""
    parts: list[Part] = []
    if "image" in stored.modality:
        if not stored.image or not Path(file_of(stored.image)).is_file():
            return None
        parts.append(ImageInput.open(stored.image))
    if stored.text and stored.text.strip():
        parts.append(stored.text)
    return Item(tuple(parts), id=stored.id) if parts else None


@dataclass(frozen=True, slots=True)
class Reranked:
    """`order`: positions of the items, best first. `scores`: by position, None for what was not scored. `seconds`: wall time."""

    order: tuple[int, ...]
    scores: tuple[float | None, ...]
    seconds: float


def rerank(
    reranker: Reranker,
    query: Query,
    items: Sequence[Item | None],
    *,
    top: int | None = None,
    seconds: float | None = None,
    reasoning: str = "",
    similarities: Sequence[float] | None = None,
) -> Reranked:
    """The order of items, which come best first, after the first `top` of them have been read together with the query.

    Those that were not scored keep their order behind all that were: None among them, what the reranker cannot read, what lies
    beyond `top`, and what was not reached within `seconds`.
    """
    started = time.perf_counter()
    numbers = [number for number, item in enumerate(items[:top]) if item is not None]
    scores: dict[int, float] = {}
    step = len(numbers) if seconds is None else AT_ONCE
    for first in range(0, len(numbers), max(1, step)):
        if seconds is not None and time.perf_counter() - started >= seconds:
            break
        part = numbers[first : first + step]
        read = [item for item in (items[number] for number in part) if item is not None]
        known = None if similarities is None else [similarities[number] for number in part]
        scores.update(zip(part, reranker.score(query, read, reasoning=reasoning, similarities=known), strict=True))
    scored = {number: score for number, score in scores.items() if score > UNREADABLE}
    order = sorted(range(len(items)), key=lambda number: (-scored.get(number, UNREADABLE), number))
    return Reranked(tuple(order), tuple(map(scored.get, range(len(items)))), time.perf_counter() - started)


def load_reranker(name: str = OWN, encoder: ModelIdentity | None = None, *, device: str = "cpu") -> Reranker:
    """The reranker of that name.

    `trace`: the adapter that comes with the bundled model, where that is the one of `encoder` or none is given; else the model of
    `encoder` itself. A TRACE checkpoint, an adapter over one, or a Qwen-VL: a TraceReranker. `st:NAME`, and any other folder or
    hub id: a CrossEncoder. Only safetensors are loaded, and no code that comes with a model. Raises ModelError.
    """
    if name == OWN:
        folder = bundled_model() / "rerank"
        if (folder / ADAPTER).is_file():
            made = TraceReranker.from_pretrained(folder, OWN, device=device)
            if encoder is None or made.base == encoder.fingerprint:
                return made
        if encoder is not None:
            from traceir.encoder import Encoder

            if not isinstance(encoder, Encoder):
                what = f"the reranker {OWN} is the encoder's own TRACE model, and a {type(encoder).__name__} has none here"
                raise ModelError(f"{what}; name a checkpoint or a CrossEncoder")
            return TraceReranker(encoder.model, OWN, base=encoder.fingerprint)
        name = str(bundled_model())
    if not name.startswith(PREFIX) and _is_trace(fetch(name)):
        return TraceReranker.from_pretrained(name, device=device)
    return CrossReranker.from_pretrained(name, device=device)


def _is_trace(folder: Path) -> bool:
    from traceir.model import NETWORKS
    from traceir.settings import SETTINGS

    own = any((folder / file).is_file() for file in (SETTINGS, ADAPTER))
    fields = read_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    kinds = [str(kind) for kind in fields.get("architectures") or ()]
    return own or (fields.get("model_type") in NETWORKS and any("ConditionalGeneration" in kind for kind in kinds))


class TraceReranker:
    """A TraceModel that reads candidates beside the query, in one of two ways.

    How likely is it to put a candidate in the words in which the query's reasoning ends? (Query likelihood, arXiv 2204.07496.) A
    model as it is does so for images alone; one that was trained to describe (TraceSettings.rerank), for all candidates. Where
    there is no reasoning, nothing is scored, nor computed.
    Trained to answer: is the candidate what the query looks for? Its score is the difference of the logits of yes and no. The
    prompt begins with the query, which the plain network reads once for all its candidates.

    In both the first stage's cosine over its temperature is added where it is known. `token_budget` bounds the padded tokens of
    one batch of candidates, those of the query included.
    """

    def __init__(self, model: TraceModel, name: str, *, base: str = "", token_budget: int = 8192, batch_rows: int = 64) -> None:
        self.model, self.name, self.base = model, name, base
        self.token_budget, self.batch_rows = token_budget, batch_rows
        self.answers = answer_tokens(model.processor) if model.settings.rerank == RERANK else None

    @classmethod
    def from_pretrained(
        cls, source: str | Path, name: str | None = None, *, device: str = "cpu", **options: Any
    ) -> TraceReranker:
        """Of a checkpoint or adapter folder or hub id. Raises ModelError."""
        from traceir.adapter import read_base
        from traceir.model import load

        model, folder = load(source, device=device, inference=True), fetch(str(source))
        base = read_base(folder).fingerprint if (folder / ADAPTER).is_file() else model.fingerprint
        return cls(model, name or str(source), base=base, **options)

    def score(
        self, query: Query, items: Sequence[Item], *, reasoning: str = "", similarities: Sequence[float] | None = None
    ) -> list[float]:
        """In natural logarithms; raises InputError for a query that cannot be read."""
        written = target_of(reasoning)
        every = self.model.settings.rerank == DESCRIBE
        if self.answers is None and not (written and (every or all(item.modality == "image" for item in items))):
            return [UNREADABLE] * len(items)
        processor, version = self.model.processor, self.model.settings.prompt_version
        layouts: dict[int, Layout] = {}
        for number, item in enumerate(items):
            try:
                if self.answers is None:
                    layouts[number] = processor.lay_out(render_query(asked_to_describe(item), version), written, end=TURN_END)
                else:
                    layouts[number] = processor.lay_out(render_offered(item, version))
            except ImageError as error:
                log.warning("item %s is not reranked: %s", item.id or "(no id)", error)
        temperature = self.model.settings.rerank_temperature or TEMPERATURE
        scores = [UNREADABLE] * len(items)
        for number, score in self._likelihoods(layouts) if self.answers is None else self._answers(query, layouts, reasoning):
            scores[number] = score + (0.0 if similarities is None else similarities[number] / temperature)
        return scores

    def _likelihoods(self, layouts: dict[int, Layout]) -> Iterator[tuple[int, float]]:
        """The logarithm of the probability of all supervised tokens of each row."""
        import torch

        with torch.inference_mode():
            for numbers in self._chunks(0, layouts):
                batch = self.model.processor.collate([layouts[number] for number in numbers]).to(self.model.device)
                hidden_BTD, counted_BT = self.model.hidden(batch), batch.targets >= 0
                logits_SV = self.model.logits(hidden_BTD[counted_BT]).float()
                chosen = torch.nn.functional.cross_entropy(logits_SV, batch.targets[counted_BT], reduction="none")
                rows = torch.split(-chosen, counted_BT.sum(dim=1).tolist())
                yield from zip(numbers, (float(row.sum()) for row in rows), strict=True)

    def _answers(self, query: Query, layouts: dict[int, Layout], reasoning: str) -> Iterator[tuple[int, float]]:
        """The logit of yes less that of no, behind query and candidate."""
        try:
            asked = self.model.processor.lay_out(render_asked(query, self.model.settings.prompt_version, reasoning))
        except ImageError as error:
            raise InputError(f"query {query.id or '(no id)'} cannot be reranked: {error}") from error
        yield from self._scores(asked, layouts)

    def _scores(self, asked: Layout, layouts: dict[int, Layout]) -> Iterator[tuple[int, float]]:
        import torch

        from traceir.network import Cache, LayerCache, Network

        model, processor = self.model, self.model.processor
        with torch.inference_mode():
            shared = Cache() if isinstance(model.network, Network) and layouts else None
            if shared is not None:
                model.hidden(processor.collate([asked]).to(model.device), shared)
            for numbers in self._chunks(len(asked), layouts):
                chunk = [layouts[number] for number in numbers]
                if shared is None:
                    batch, cache = processor.collate([asked.joined(layout) for layout in chunk]), None
                else:
                    start = int(asked.positions.max()) + 1
                    batch = processor.collate([replace(layout, positions=layout.positions + start) for layout in chunk])
                    seen = torch.ones(len(chunk), len(asked), dtype=batch.mask.dtype)
                    batch, cache = replace(batch, mask=torch.cat([seen, batch.mask], dim=1)), copy(shared)
                    cache.layers = [
                        LayerCache(held.keys.expand(len(chunk), -1, -1, -1), held.values.expand(len(chunk), -1, -1, -1))
                        for held in shared.layers
                    ]
                state_BD = model.hidden(batch.to(model.device), cache)[:, -1]
                yes_B, no_B = model.logits(state_BD)[:, self.answers].float().unbind(1)
                yield from zip(numbers, (yes_B - no_B).tolist(), strict=True)

    def _chunks(self, before: int, layouts: dict[int, Layout]) -> Iterator[list[int]]:
        """Numbers of candidates, sorted by length, in chunks within the budget; `before` tokens precede each."""
        chunk: list[int] = []
        for number in sorted(layouts, key=lambda number: (len(layouts[number]), number)):
            width = before + len(layouts[number])
            if chunk and (len(chunk) >= self.batch_rows or (len(chunk) + 1) * width > self.token_budget):
                yield chunk
                chunk = []
            chunk.append(number)
        if chunk:
            yield chunk


def answer_tokens(processor: Any) -> list[int]:
    """The first tokens in which "yes" and "no" differ: a tokenizer may begin every word with the same one."""
    for yes, no in zip(*map(processor.plain_ids, ANSWERS), strict=False):
        if yes != no:
            return [yes, no]
    raise ModelError(f"the tokenizer cannot tell {' from '.join(ANSWERS)}, so this checkpoint cannot be asked for them")


def target_of(reasoning: str) -> str:
    """What a written reasoning ends in: the description of the target, behind all steps (completion_text)."""
    return re.split(r"[;.!?]\s+", reasoning.strip())[-1].strip()


class CrossReranker:
    """A CrossEncoder of sentence-transformers. Thread-safe: the library scores for one thread at a time.

    Scores are logits, which keep apart what a sigmoid would round to 1. Texts are cut at the model's own limit. One that reads
    texts alone goes by the texts of items and queries that have one; what has none it cannot read.
    """

    def __init__(self, model: Any, name: str, *, batch_rows: int = 32) -> None:
        self.model, self.name, self.batch_rows = model, name, batch_rows
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, source: str, *, device: str = "cpu") -> CrossReranker:
        """The model of a folder or hub id, in float32.

        Raises ModelError where it cannot be had, has other weights than safetensors, needs code of its own, or gives more than
        one score.
        """
        from traceir.library import checked_folder, one_line

        name = plain_name(source)
        folder, _ = checked_folder(name, "CrossEncoder")
        import torch
        from sentence_transformers import CrossEncoder

        options = {"dtype": torch.float32, "use_safetensors": True}
        try:
            # An activation that is given is not looked for by the name in the model's files.
            model = CrossEncoder(
                str(folder), device=device, local_files_only=True, trust_remote_code=False, model_kwargs=options,
                activation_fn=torch.nn.Identity(),
            )  # fmt: skip
        except Exception as error:  # its modules and transformers raise many kinds
            raise ModelError(f"sentence-transformers cannot load {name} as a CrossEncoder: {one_line(error)}") from error
        if model.num_labels != 1:
            raise ModelError(f"{name} gives {model.num_labels} scores for a pair; a reranker gives one")
        return cls(model, name)

    def score(
        self, query: Query, items: Sequence[Item], *, reasoning: str = "", similarities: Sequence[float] | None = None
    ) -> list[float]:
        """What `CrossEncoder.predict` gives without its activation."""
        from traceir.library import one_line

        scores = [UNREADABLE] * len(items)
        asked = self._input(query)
        if asked is None:
            return scores
        inputs = {number: offered for number, item in enumerate(items) if (offered := self._input(item)) is not None}
        pairs = {number: _pair(asked, offered) for number, offered in inputs.items()}
        if not pairs:
            return scores
        try:
            with self._lock:
                values = self.model.predict(list(pairs.values()), batch_size=self.batch_rows, show_progress_bar=False)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise InputError(f"query {query.id or '(no id)'}: {self.name} cannot score it: {one_line(error)}") from error
        for number, value in zip(pairs, values, strict=True):
            scores[number] = float(value)
        return scores

    def _input(self, content: Query | Item) -> Any:
        """The content as the library takes it; None where the model cannot read it."""
        text = content.text or (content.instruction or "" if isinstance(content, Query) and not content.images else "")
        if content.images and self.model.supports("image"):
            try:
                image = content.images[0].load()
            except ImageError as error:
                log.warning("%s is not reranked: %s", content.id or "(no id)", error)
                return None
            return {"image": image, "text": text} if text else {"image": image}
        return text or None


def _pair(asked: Any, offered: Any) -> tuple[Any, Any]:
    """Beside an image the library would open a text that is a path or an address; in a dict it stays a text."""
    if isinstance(asked, str) and isinstance(offered, str):
        return asked, offered
    first, second = ({"text": side} if isinstance(side, str) else side for side in (asked, offered))
    return first, second
