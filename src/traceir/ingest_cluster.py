"""`add` on a cluster: workers of Ray Data read, hash and encode, and this process alone writes to the index.

The steps are those of ingest.py. A batch goes to a worker with what the index keeps under its ids, comes back with vectors, and
is durable before the next one is taken, in the order of arrival. A run that was cut off is simply repeated and goes on.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from tqdm import tqdm

from traceir.errors import InputError, ModelError, TraceError
from traceir.index.copy import Copied
from traceir.index.store import Index, Stored, Vectors, check_maker, image_of
from traceir.ingest import AddReport, Counts, Encoded, check_paths, count_sources, encode_fresh, sort_out, write
from traceir.items import Item, Vector
from traceir.ray_session import ONE_CPU, Share, on_ray
from traceir.search import EncoderLike
from traceir.sources import Failure, Note, Source, find_batches
from traceir.world import World

log = logging.getLogger(__name__)
MakeEncoder = Callable[[], EncoderLike]
"""Makes the encoder where it is called; Ray sends it to the workers, so it holds settings and no weights."""
WINDOW_BATCHES: Final = 4096
WINDOW_CHARACTERS: Final = 64 * 2**20
"""What is handed to Ray at a time: at most so many batches and little more than so many characters of sources."""
MOST_STARTS: Final = 3
"""Workers that may die with a batch in their hands before it counts as the batch's fault."""


@dataclass(frozen=True, slots=True)
class Described:
    """What is known of an encoder that lives elsewhere: enough for `open_index`."""

    fingerprint: str
    prompt_version: str
    width: int
    world: World | None = None


def add_on_ray(
    paths: Sequence[str | os.PathLike[str]],
    index: Index,
    make_encoder: MakeEncoder,
    *,
    workers: int,
    batch: int = 64,
    share: Share = ONE_CPU,
    progress: bool = True,
) -> AddReport:
    """As `ingest.add`, by so many workers on the cluster of $RAY_ADDRESS, or on this machine where that is not set.

    Paths, and the pictures that lines name, must lie on a file system that all workers see under the same names. A worker makes
    its encoder when it first has something to encode; what stops a worker is a ModelError here. A worker that dies is
    replaced, and its batches are done again. `failed` is in the order of the sources, as in `add`.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}; give at least 1")
    check_paths(paths, batch)
    total = count_sources(paths) if progress else None
    info = index.info()
    counts = Counts()
    told_of: list[tuple[int, Failure | Note]] = []
    with on_ray(workers, share), tqdm(total=total, unit="item", desc="adding", disable=not progress) as bar:
        told = (make_encoder, info.uri, Described(info.fingerprint, info.prompt_version, info.dim), _count_starts())
        for window in _windows(paths, index, batch):
            told_of += window.told
            counts += Counts(skipped=window.again)
            bar.update(sum(isinstance(one, Failure) for _, one in window.told) + window.again)
            for answer in _answers(window, told, workers, share):
                counts += write(index, answer.encoded, answer.moved) + Counts(skipped=answer.skipped)
                told_of += [(answer.number, one) for one in answer.told]
                bar.update(answer.size)
    told_of.sort(key=lambda numbered: numbered[0])
    failed = tuple(one for _, one in told_of if isinstance(one, Failure))
    notes = tuple(one for _, one in told_of if isinstance(one, Note))
    return AddReport(counts.added, counts.updated, counts.skipped, failed, notes)


def describe_encoder(make_encoder: MakeEncoder, share: Share) -> Described:
    """Whose vectors the workers will make: one of them makes the encoder and tells. Call it within `on_ray`."""
    import ray

    def describe() -> Described:
        encoder = make_encoder()
        return Described(encoder.fingerprint, encoder.prompt_version, encoder.width, getattr(encoder, "world", None))

    with _explained():
        task = ray.remote(describe).options(num_cpus=share.cpus, num_gpus=share.gpus)
        maker: Described = ray.get(task.remote())
    return maker


@dataclass(slots=True)
class _Window:
    """Numbered batches as JSON, what was told on the way to them, and how many sources were merely named again."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    told: list[tuple[int, Failure | Note]] = field(default_factory=list)
    again: int = 0


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a worker made of a batch of `size` sources."""

    number: int
    size: int
    skipped: int
    encoded: list[tuple[Item, Vector]]
    moved: list[Item]
    told: list[Failure | Note]


def _windows(paths: Sequence[str | os.PathLike[str]], index: Index, batch: int) -> Iterator[_Window]:
    """All sources in their order; a window bounds what this process and Ray's object store hold of them."""
    window, characters = _Window(), 0
    for number, found in enumerate(find_batches(paths, batch)):
        window.told += [(number, failure) for failure in found.failed]
        window.told += [(number, note) for note in found.notes]
        window.again += found.again
        if found.sources:
            known = index.get([source.id for source in found.sources])
            window.rows.append({"number": number, "batch": _packed(found.sources, known)})
            characters += len(window.rows[-1]["batch"])
        if len(window.rows) == WINDOW_BATCHES or characters > WINDOW_CHARACTERS:
            yield window
            window, characters = _Window(), 0
    yield window


def _answers(window: _Window, told: tuple[Any, ...], workers: int, share: Share) -> Iterator[_Answer]:
    """What the workers return, in order of arrival, each batch once. Ray holds workers back while answers wait to be taken."""
    if not window.rows:
        return
    import ray

    with _explained():
        batches = ray.data.from_items(window.rows, override_num_blocks=len(window.rows))
        batches.context.enable_progress_bars = False
        answered = batches.map_batches(
            ItemWorker,
            fn_constructor_args=told,
            batch_size=1,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(window.rows))),
            num_cpus=share.cpus,
            num_gpus=share.gpus or None,
        )
        waiting = {row["number"] for row in window.rows}
        for table in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
            for row in table.to_pylist():
                if row["number"] in waiting:  # a batch that a dying worker had answered may be answered again
                    waiting.remove(row["number"])
                    yield _unpacked_answer(row)
        if waiting:
            raise ModelError(f"Ray returned nothing for {len(waiting)} batches; run it again to go on")


class ItemWorker:
    """What Ray keeps on a worker: its encoder. Called with tables of one packed batch, it returns an answer as one row."""

    def __init__(self, make_encoder: MakeEncoder, uri: str, maker: Described, starts: Any) -> None:
        self.make_encoder, self.uri, self.maker, self.starts = make_encoder, uri, maker, starts
        self.encoder: EncoderLike | None = None

    def __call__(self, table: Any) -> Any:
        import pyarrow as pa

        (row,) = table.to_pylist()
        sources, known = _unpacked(row["batch"])
        try:
            self._check_starts(row["number"], sources)
            answer, vectors_ND = self._take(sources, known)
        except TraceError as error:
            answer, vectors_ND = {"stopped": str(error)}, np.zeros((0, 0), dtype=np.float32)
        columns = {"number": [row["number"]], "answer": [json.dumps(answer)], "vectors": [vectors_ND.tobytes()]}
        return pa.table(columns)

    def _take(self, sources: Sequence[Source], known: Mapping[str, Stored]) -> tuple[dict[str, Any], Vectors]:
        sorted_out = sort_out(sources, known)
        done = encode_fresh(self._encoder(), sorted_out.fresh, known) if sorted_out.fresh else Encoded()
        answer = {
            "size": len(sources),
            "skipped": sorted_out.skipped + done.skipped,
            "encoded": [asdict(_stored(item)) for item, _ in done.pairs],
            "moved": [asdict(_stored(item)) for item in sorted_out.moved],
            "failed": [asdict(failure) for failure in (*sorted_out.failed, *done.failed)],
            "notes": [asdict(note) for note in (*sorted_out.notes, *done.notes)],
        }
        rows = [vector for _, vector in done.pairs]
        return answer, np.asarray(rows, dtype=np.float32).reshape(len(rows), -1 if rows else 0)

    def _check_starts(self, number: int, sources: Sequence[Source]) -> None:
        import ray

        if ray.get(self.starts.add.remote(number)) > MOST_STARTS:
            raise ModelError(
                f"{MOST_STARTS} workers died of the batch from {sources[0].place} to {sources[-1].place}; give them more memory, "
                "or run it again with --batch 1 to find the item and remove it"
            )

    def _encoder(self) -> EncoderLike:
        if self.encoder is None:
            encoder = self.make_encoder()
            check_maker(self.uri, "model", self.maker.fingerprint, encoder.fingerprint)
            check_maker(self.uri, "prompt version", self.maker.prompt_version, encoder.prompt_version)
            self.encoder = encoder
        return self.encoder


class _Starts:
    """Counts how often work on each batch was begun. It lives on Ray, where it outlives the workers."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()

    def add(self, number: int) -> int:
        self.counts[number] += 1
        return self.counts[number]


def _count_starts() -> Any:
    import ray

    return ray.remote(_Starts).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()


# What goes to a worker and comes back, as JSON: all of it is ASCII, whatever names and texts hold


def _packed(sources: Sequence[Source], known: Mapping[str, Stored]) -> str:
    """Sources with absolute paths, and of what is known all but the text, which is not compared."""
    told = [{**asdict(source), "path": str(source.path.absolute())} for source in sources]
    return json.dumps({"sources": told, "known": [asdict(replace(stored, text=None)) for stored in known.values()]})


def _unpacked(batch: str) -> tuple[list[Source], dict[str, Stored]]:
    told = json.loads(batch)
    sources = [Source(**{**source, "path": Path(source["path"])}) for source in told["sources"]]
    return sources, {stored["id"]: Stored(**stored) for stored in told["known"]}


def _unpacked_answer(row: Mapping[str, Any]) -> _Answer:
    """Raises ModelError where the worker was stopped by an error that is not about a single item."""
    told = json.loads(row["answer"])
    if "stopped" in told:
        raise ModelError(f"a worker stopped: {told['stopped']}")
    items: dict[str, list[Item]] = {name: [Copied(Stored(**one)) for one in told[name]] for name in ("encoded", "moved")}
    count = len(items["encoded"])
    vectors_ND = np.frombuffer(row["vectors"], dtype=np.float32).reshape(count, -1 if count else 0)
    return _Answer(
        number=row["number"],
        size=told["size"],
        skipped=told["skipped"],
        encoded=list(zip(items["encoded"], vectors_ND, strict=True)),
        moved=items["moved"],
        told=[*(Failure(**failure) for failure in told["failed"]), *(Note(**note) for note in told["notes"])],
    )


def _stored(item: Item) -> Stored:
    """What an index keeps of an item. The hash was taken when the file was read, so nothing is read again."""
    return Stored(str(item.id), item.modality, item.text or None, image_of(item), dict(item.fields), item.content_hash())


@contextmanager
def _explained() -> Iterator[None]:
    """Turns what Ray raises into a ModelError of one line; an error of our own inside it is raised as it was."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayError as error:
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, TraceError):
            raise cause from None
        named = re.search(r"^[\w.]+(Error|Exception)\b.*$", str(error), re.MULTILINE)  # behind it come the frames of Ray itself
        what = named[0] if named else f"{type(error).__name__}: {error}"
        raise ModelError(f"the workers failed: {what}; see Ray's logs, and run it again to go on") from error
