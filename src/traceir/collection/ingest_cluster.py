"""`add` on a cluster: Ray's workers read, hash and encode, and this process alone writes to the index.

The steps are those of ingest.py. A batch goes to an idle worker with what the index keeps under its ids, comes back with vectors,
and is durable before its answer counts, in the order of arrival. A run that was cut off is simply repeated and goes on.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from traceir.collection.ingest import AddReport, Processed, check_paths, find_in_roots, keep, process, progress_bar
from traceir.collection.sources import Source, SourceBatch, find_batches
from traceir.errors import InputError, ModelError, TraceError
from traceir.index.copy import Copied
from traceir.index.store import Index, IndexInfo, Opening, Stored, image_of
from traceir.items import Item, Vector
from traceir.ray_session import ONE_CPU, Share, on_ray
from traceir.retrieval.search import EncoderLike
from traceir.world import World

MakeEncoder = Callable[[], EncoderLike]
"""Makes the encoder where it is called; Ray sends it to the workers, so it holds settings and no weights."""
MOST_STARTS: Final = 3
"""Workers that may crash on one batch before the batch is taken to be the cause."""
_Answer = tuple[list[tuple[Stored, Vector]], list[Stored], Processed]
"""Encoded items with their vectors, moved ones, and the rest of what became of a batch."""


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

    Paths, and the images that lines name, must lie on a file system that all workers see under the same names. A worker makes
    its encoder when it first has something to encode; what stops a worker is a ModelError here. A worker that crashes is
    replaced, and its batch is done again. `failed` is in the order of the sources, as in `add`.
    """
    if workers < 1:
        raise InputError(f"workers is {workers}; give at least 1")
    check_paths(paths, batch)
    reports: dict[int, AddReport] = {}
    with on_ray(workers, share), progress_bar(paths, progress) as bar:
        for number, part, done in _answers(find_batches(find_in_roots(paths, index), batch), index, make_encoder, workers, share):
            reports[number] = keep(index, part, done)
            bar.update(part.size)
    whole = AddReport()
    for number in sorted(reports):
        whole.include(reports[number])
    return whole


def describe_encoder(make_encoder: MakeEncoder, share: Share) -> Described:
    """The identity of the workers' encoder, which one of them makes to find out. Call it within `on_ray`."""
    import ray

    def describe() -> Described:
        encoder = make_encoder()
        return Described(encoder.fingerprint, encoder.prompt_version, encoder.width, getattr(encoder, "world", None))

    with _explained():
        description: Described = ray.get(ray.remote(describe).options(num_cpus=share.cpus, num_gpus=share.gpus).remote())
    return description


def _answers(
    batches: Iterator[SourceBatch], index: Index, make_encoder: MakeEncoder, workers: int, share: Share
) -> Iterator[tuple[int, SourceBatch, Processed]]:
    """Every batch with its number and what became of it, in order of arrival; a worker has one batch at a time."""
    import ray

    info = index.info()

    options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": -1, "max_task_retries": MOST_STARTS - 1}
    numbered = enumerate(batches)
    idle: list[Any] = []
    busy: dict[Any, tuple[int, SourceBatch, Any]] = {}
    started = 0
    while True:
        while (idle or started < workers) and (following := next(numbered, None)):
            number, part = following
            if not part.sources:
                yield number, part, Processed()
                continue
            if not idle:
                idle.append(ray.remote(ItemWorker).options(**options).remote(make_encoder, info))
                started += 1
            worker = idle.pop()
            known = index.get([source.id for source in part.sources])
            known = {id: replace(stored, text=None) for id, stored in known.items()}  # texts are not compared
            sources = [replace(source, path=source.path.absolute()) for source in part.sources]
            busy[worker.process.remote(sources, known)] = number, part, worker
        if not busy:
            return
        (ready,), _ = ray.wait(list(busy), num_returns=1)
        number, part, worker = busy.pop(ready)
        with _explained(part.sources):
            encoded, moved, done = ray.get(ready)
        idle.append(worker)
        items = [(Copied(stored), vector) for stored, vector in encoded]
        yield number, part, replace(done, encoded=items, moved=list(map(Copied, moved)))


class ItemWorker:
    """What Ray keeps on a worker: its encoder."""

    def __init__(self, make_encoder: MakeEncoder, info: IndexInfo) -> None:
        self.make_encoder, self.info = make_encoder, info
        self.encoder: EncoderLike | None = None

    def process(self, sources: Sequence[Source], known: Mapping[str, Stored]) -> _Answer:
        """What became of a batch; its items go back as an index keeps them, without the images that were read here."""
        try:
            done = process(sources, known, self._encoder)
        except TraceError as error:
            raise ModelError(f"a worker stopped: {error}") from error
        encoded = [(_stored(item), vector) for item, vector in done.encoded]
        return encoded, list(map(_stored, done.moved)), Processed(touched=done.touched, rest=done.rest)

    def _encoder(self) -> EncoderLike:
        if self.encoder is None:
            encoder = self.make_encoder()
            self.info.check(self.info.uri, Opening(encoder.fingerprint, encoder.prompt_version, encoder.width))
            self.encoder = encoder
        return self.encoder


def _stored(item: Item) -> Stored:
    """What an index keeps of an item. The hash was taken when the file was read, so nothing is read again."""
    return Stored(str(item.id), item.modality, item.text or None, image_of(item), dict(item.fields), item.content_hash())


@contextmanager
def _explained(sources: Sequence[Source] = ()) -> Iterator[None]:
    """Turns what Ray raises into a ModelError of one line; an error of our own inside it is raised as it was."""
    from ray.exceptions import RayActorError, RayError, RayTaskError

    try:
        yield
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, TraceError):
            raise error.cause from None
        if isinstance(error, RayActorError) and sources:
            raise ModelError(
                f"{MOST_STARTS} workers crashed on the batch from {sources[0].location} to {sources[-1].location}; give them "
                "more memory, or run it again with --batch 1 to find the item and remove it"
            ) from error
        named = re.search(r"^[\w.]+(Error|Exception)\b.*$", str(error), re.MULTILINE)  # behind it come the frames of Ray itself
        what = named[0] if named else f"{type(error).__name__}: {error}"
        raise ModelError(f"the workers failed: {what}; see Ray's logs, and run it again to go on") from error
