"""Embeddings on disk: encoded once, block by block, by any number of processes, and never again.

Inputs (Items, or Queries by one route) are cut in the order given into blocks of fixed size. A block is what is written at once
and what a lost process loses at most. It is named by the hash of the contents it holds, so that equal pools of two folders share
it, and an input that changes makes its block another one. Which process encodes a block has no influence on what is in it.
Files: docs/formats.md, section 12; blocks are staged in `writing/` and renamed, and what lies there an hour is removed.

The key of an image is the SHA-256 of its file, which costs one reading. Beside the key of each block a signature is kept, made of
texts and of path, size, modification and change time of each image file, which costs one `stat` an image. A file is thus taken
for unchanged as git and make take it, and more strictly, because programs cannot set the change time back. Files changed within
the last seconds are not trusted to their times. Copied folders have new times and are read again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from traceir.errors import InputError, ModelError, StoreError
from traceir.files import replacing, write_whole
from traceir.items import Encoding, Item, Query, Route, Vector
from traceir.retrieval.search import EncoderLike

log = logging.getLogger(__name__)

Input = TypeVar("Input", Item, Query)
Matrix = npt.NDArray[np.floating[Any]]
Shard = tuple[int, int]
EmbeddingPlan = Sequence[tuple[str | None, int]]
"""Key and rows of each block of one sequence of inputs, in order; the key is None where another process is to know it."""

FORMAT: Final = 1
CANDIDATE_ROWS: Final = 4096
QUERY_ROWS: Final = 512
AT_ONCE: Final = 512
"""Inputs whose images are in memory together while they are encoded."""
ABANDONED_SECONDS: Final = 3600.0
YOUNG_NS: Final = 2_000_000_000
"""A file changed twice within the resolution of its times looks unchanged; younger files are read instead."""

_KEY = re.compile(r"[0-9a-f]{64}")
_ENCODING_FIELDS: Final = ("route", "reasoning", "tokens", "emb_probability", "truncated")


@dataclass(frozen=True, slots=True)
class EncoderIdentity:
    """All that decides a vector beside its content. `route` is None for candidates; `more` names what else matters.

    `threshold` and `max_reasoning_tokens` are those of the encoder in use, for queries only.
    """

    fingerprint: str
    prompt_version: str
    width: int
    route: Route | None = None
    threshold: float | None = None
    max_reasoning_tokens: int | None = None
    dtype: Literal["float32", "float16"] = "float32"
    more: Mapping[str, str | int | float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, encoder: EncoderLike, route: Route | None = None) -> EncoderIdentity:
        """Of an encoder's vectors, with all settings that it tells."""
        threshold, budget = (getattr(encoder, name, None) if route else None for name in ("threshold", "budget"))
        more = dict(getattr(encoder, "vector_settings", {}))
        return cls(encoder.fingerprint, encoder.prompt_version, encoder.width, route, threshold, budget, more=more)

    @property
    def kind(self) -> str:
        return "candidates" if self.route is None else f"queries-{self.route}"

    @property
    def described(self) -> dict[str, Any]:
        """All fields, as the manifest holds them."""
        return asdict(self) | {"more": dict(self.more)}

    @property
    def folder(self) -> str:
        """A folder name that no identity with other fields has."""
        digest = hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{re.sub(r'[^A-Za-z0-9]+', '_', self.fingerprint)[:40]}-{digest[:12]}"


class EmbeddingStore:
    """The embeddings of one encoder below `root`. Any number of processes may fill and read one folder at once."""

    def __init__(self, root: Path | str, identity: EncoderIdentity, *, block_rows: int | None = None) -> None:
        self.identity = identity
        self.block_rows = block_rows or (CANDIDATE_ROWS if identity.route is None else QUERY_ROWS)
        self.folder = Path(root) / identity.folder
        self._staging = self.folder / "writing"
        for name in ("blocks", "known", "writing"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        file = self.folder / "manifest.json"
        wanted = {"format": FORMAT, "block_rows": self.block_rows, "maker": identity.described}
        if not file.is_file():
            write_whole(file, json.dumps(wanted, indent=1) + "\n")
        try:
            manifest = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise StoreError(f"{file} cannot be read ({error}); remove {self.folder}, or restore the file") from error
        if names := sorted(name for name in {**wanted, **manifest} if manifest.get(name) != wanted.get(name)):
            raise StoreError(
                f"{file}: {', '.join(names)} are {[manifest.get(name) for name in names]}, this run has "
                f"{[wanted.get(name) for name in names]}; use the same settings, or another root"
            )

    def fill(
        self,
        inputs: Iterable[Input],
        encode: Callable[[Sequence[Input]], Sequence[Encoding]],
        *,
        shard: Shard = (0, 1),
        repair: bool = False,
        total: int | None = None,
        progress: bool = True,
    ) -> EmbeddingPlan:
        """Encodes what is not there yet of the blocks whose number % n is i, for `shard` (i, n).

        `inputs` are taken one block at a time; images of blocks of other shards are not touched. `repair` reads the blocks that
        are there and encodes damaged ones again; without it a damaged header is a StoreError, and what lies behind it is checked
        when it is read. `total` is the number of inputs, for the display alone. The keys returned are those of this shard.
        """
        mine, shards = check_shard(shard)
        for path in self._staging.iterdir():
            with suppress(FileNotFoundError):  # another process was faster
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
        plan: list[tuple[str | None, int]] = []
        share = None if total is None else total // shards
        with tqdm(total=share, desc=self.identity.kind, unit=" inputs", disable=not progress, mininterval=2.0) as bar:
            for number, chunk in enumerate(_cut(inputs, self.block_rows)):
                key = self._key(chunk) if number % shards == mine else None
                plan.append((key, len(chunk)))
                if key is not None and not self._is_there(key, len(chunk), repair):
                    started = time.perf_counter()
                    self._write(key, chunk, encode(chunk), started)
                    bar.update(len(chunk))
                elif key is not None and bar.total is not None:
                    bar.total -= len(chunk)  # rates are those of the encoder
        return plan

    def plan(self, inputs: Iterable[Input]) -> EmbeddingPlan:
        """The blocks these inputs are cut into, with all keys; reads the images of blocks not met before, else their `stat`."""
        return [(self._key(chunk), len(chunk)) for chunk in _cut(inputs, self.block_rows)]

    def missing(self, plan: EmbeddingPlan) -> list[int]:
        """Numbers of the blocks that are not encoded, or of which the plan does not know the key."""
        return [number for number, (key, _) in enumerate(plan) if key is None or not self._block(key).is_dir()]

    def open(self, plan: EmbeddingPlan) -> Embeddings:
        """The embeddings of a plan, read lazily. Raises StoreError where blocks are missing."""
        if missing := self.missing(plan):
            raise StoreError(
                f"{self.folder}: {len(missing)} of {len(plan)} blocks are not encoded (the first is number {missing[0]}); "
                "let every shard fill its blocks, then plan again"
            )
        return Embeddings(self, plan)

    def vectors(self, key: str, rows: int, *, whole: bool) -> Matrix:
        """The vectors of a block, memory-mapped [rows, D]. `whole` also reads them and refuses values that are not finite."""
        with self._reading(key, "vectors.npy") as file:
            vectors: Matrix = np.lib.format.open_memmap(file, mode="r")
            if vectors.dtype != np.dtype(self.identity.dtype) or vectors.shape != (rows, self.identity.width):
                wanted = f"{self.identity.dtype} [{rows}, {self.identity.width}]"
                raise ValueError(f"it holds {vectors.dtype} {list(vectors.shape)}, not {wanted}")
            if (size := file.stat().st_size) != vectors.nbytes + getattr(vectors, "offset", 0):
                raise ValueError(f"it is {size} bytes long, which is not what its header says")
            if whole and not np.isfinite(vectors).all():
                raise ValueError("it holds values that are not finite")
        return vectors

    def side(self, key: str, rows: int) -> list[dict[str, Any]]:
        """The lines beside the vectors of a block of queries."""
        with self._reading(key, "encodings.jsonl") as file:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
            if len(lines) != rows or any(not isinstance(line, dict) or set(line) != set(_ENCODING_FIELDS) for line in lines):
                raise ValueError(f"it does not hold {rows} lines with {', '.join(_ENCODING_FIELDS)}")
        return lines

    def seconds(self, key: str) -> float:
        """What encoding a block took, wall time."""
        with self._reading(key, "block.json") as file:
            return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])

    def _block(self, key: str) -> Path:
        return self.folder / "blocks" / key

    @contextmanager
    def _reading(self, key: str, name: str) -> Iterator[Path]:
        """One file of a block; what goes wrong with it is a StoreError that names it."""
        file = self._block(key) / name
        try:
            yield file
        except (OSError, ValueError, EOFError, SyntaxError, KeyError, TypeError) as error:
            raise StoreError(
                f"{file} is damaged ({error}); fill with repair=True, or remove the folder {file.parent} and fill again"
            ) from error

    def _is_there(self, key: str, rows: int, repair: bool) -> bool:
        if not self._block(key).is_dir():
            return False
        try:
            self.vectors(key, rows, whole=repair)
            if self.identity.route is not None:
                self.side(key, rows)
        except StoreError as error:
            if not repair:
                raise
            log.warning("%s; encoding it again", error)
            with suppress(FileNotFoundError):  # another process was faster
                shutil.rmtree(self._block(key).rename(self._scratch(key)))
            return False
        return True

    def _key(self, chunk: Sequence[Input]) -> str:
        """The hash of a block's contents, looked up by its signature where that is known."""
        signature = _signature(chunk)
        known = self.folder / "known" / signature if signature is not None else None
        if known is not None and known.is_file() and _KEY.fullmatch(key := known.read_text(encoding="utf-8").strip()):
            return key
        key = hashlib.sha256("\n".join(content.content_hash() for content in chunk).encode()).hexdigest()
        if known is not None:
            write_whole(known, f"{key}\n")
        return key

    def _write(self, key: str, chunk: Sequence[Input], encodings: Sequence[Encoding], started: float) -> None:
        seconds = time.perf_counter() - started
        vectors = self._checked(chunk, encodings)
        scratch = self._scratch(key)
        with replacing(scratch / "vectors.npy", binary=True, durable=True) as stream:
            np.save(stream, vectors, allow_pickle=False)
        if self.identity.route is not None:
            lines = (json.dumps({name: getattr(encoding, name) for name in _ENCODING_FIELDS}) for encoding in encodings)
            write_whole(scratch / "encodings.jsonl", "".join(f"{line}\n" for line in lines), durable=True)
        write_whole(scratch / "block.json", json.dumps({"rows": len(chunk), "seconds": round(seconds, 3)}) + "\n")
        try:
            os.replace(scratch, self._block(key))
        except OSError:
            shutil.rmtree(scratch)
            if not self._block(key).is_dir():  # else another process was first, with the same block
                raise

    def _checked(self, chunk: Sequence[Input], encodings: Sequence[Encoding]) -> Matrix:
        vectors = np.array([encoding.vector for encoding in encodings])
        if vectors.shape != (len(chunk), self.identity.width):
            wanted = [len(chunk), self.identity.width]
            raise ModelError(f"the encoder returned vectors of shape {list(vectors.shape)}, the store needs {wanted}; report it")
        with np.errstate(over="ignore"):
            stored: Matrix = vectors.astype(self.identity.dtype, copy=False)  # float16 ends at 65,504
        finite = np.isfinite(stored).all(axis=1)
        if not finite.all():
            name = chunk[int(finite.argmin())].id
            raise ModelError(f"the vector of {name!r} is not finite as {self.identity.dtype}; the checkpoint has diverged")
        return stored

    def _scratch(self, name: str) -> Path:
        return self._staging / f"{name[:16]}-{os.getpid()}-{secrets.token_hex(4)}"


class Embeddings:
    """The embeddings of one plan, in order, read from memory-mapped blocks; may be iterated any number of times."""

    def __init__(self, store: EmbeddingStore, plan: EmbeddingPlan) -> None:
        self._store = store
        self._blocks = [(key, rows) for key, rows in plan if key is not None]
        self._checked: set[str] = set()

    def __len__(self) -> int:
        return sum(rows for _, rows in self._blocks)

    def __iter__(self) -> Iterator[Matrix]:
        """Blocks [n, D] as stored. Each is read through once for values that are not finite, when it is first met."""
        for key, rows in self._blocks:
            vectors = self._store.vectors(key, rows, whole=key not in self._checked)
            self._checked.add(key)
            yield vectors

    def encodings(self) -> Iterator[Encoding]:
        """The encodings of queries, in order, as the encoder returned them (vectors rounded where stored as float16)."""
        if self._store.identity.route is None:
            raise InputError(f"{self._store.folder} holds candidates, which have vectors only; iterate over the blocks")
        for (key, rows), vectors in zip(self._blocks, self, strict=True):
            for line, vector in zip(self._store.side(key, rows), np.asarray(vectors, dtype=np.float32), strict=True):
                yield Encoding(vector=vector, **line)

    def matrix(self) -> Vector:
        """All vectors in memory, float32 [N, D]."""
        whole = np.empty((len(self), self._store.identity.width), dtype=np.float32)
        return np.concatenate(list(self), out=whole, casting="same_kind") if len(self) else whole

    @property
    def seconds(self) -> float:
        """Wall time of encoding, added up over blocks, whichever process and run it was."""
        return sum(self._store.seconds(key) for key, _ in self._blocks)


class Embedder:
    """Embeddings of items and queries by one encoder, kept below `cache`; the i-th of n shares is encoded here (`shard`).

    `repair` encodes damaged blocks again and logs them; without it they are a StoreError that names the file.
    """

    def __init__(
        self, encoder: EncoderLike, cache: Path, *, shard: Shard = (0, 1), repair: bool = False, progress: bool = False
    ) -> None:
        self.encoder, self.cache, self.shard = encoder, cache, check_shard(shard)
        self.repair, self.progress, self._calls = repair, progress, 0

    def items(self, make: Callable[[], Iterator[Item]], count: int) -> Embeddings | None:
        """Candidates, in order; None while other shares are not encoded. `make` begins the inputs anew."""
        return self._embed(None, make, count, self.encoder.encode_items)

    def queries(self, make: Callable[[], Iterator[Query]], count: int, route: Route) -> Embeddings | None:
        """Queries by one route, in order; None while other shares are not encoded."""
        return self._embed(route, make, count, partial(self.encoder.encode_queries, route=route))

    def _embed(
        self, route: Route | None, make: Callable[[], Iterator[Any]], count: int, encode: Callable[[list[Any]], list[Encoding]]
    ) -> Embeddings | None:
        def encode_all(chunk: Sequence[Any]) -> list[Encoding]:
            return [encoding for piece in _cut(chunk, AT_ONCE) for encoding in encode(piece)]

        store = EmbeddingStore(self.cache, EncoderIdentity.of(self.encoder, route))
        number, shards = self.shard
        # The share moves on by one at every call: first blocks, of which many inputs have no more, go to all shards alike.
        share = (number + self._calls) % shards, shards
        self._calls += 1
        plan = store.fill(make(), encode_all, shard=share, repair=self.repair, total=count, progress=self.progress)
        if shards > 1:
            plan = store.plan(make())
        return None if store.missing(plan) else store.open(plan)


def check_shard(shard: Shard) -> Shard:
    """The shard (i, n) itself; InputError unless 0 <= i < n."""
    number, count = shard
    if not 0 <= number < count:
        raise InputError(f"shard {number} of {count} does not exist; give (i, n) with 0 <= i < n")
    return shard


def shard_from_environment(environment: Mapping[str, str] | None = None) -> Shard:
    """(RANK, WORLD_SIZE) as torchrun sets them, else (SLURM_PROCID, SLURM_NTASKS), else (0, 1).

    A batch script that does not start its program with `srun` has SLURM_PROCID 0 and the number of tasks all the same: it fills
    its share only, and `open` then says what is missing.
    """
    environment = os.environ if environment is None else environment
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment:
            values = [environment.get(name, "") for name in (rank, count)]
            if not all(value.isdecimal() for value in values):
                raise InputError(f"{rank} is {values[0]!r} and {count} is {values[1]!r}; set both to numbers, or neither")
            return check_shard((int(values[0]), int(values[1])))
    return 0, 1


def _cut(inputs: Iterable[Input], rows: int) -> Iterator[list[Input]]:
    iterator = iter(inputs)
    while chunk := list(islice(iterator, rows)):
        yield chunk


def _signature(chunk: Sequence[Input]) -> str | None:
    """A hash of texts and of the times and sizes of image files; None where hashing costs nothing or times prove nothing."""
    digest, newest = hashlib.sha256(), 0
    for content in chunk:
        described: list[object] = [content.instruction or "", content.target or ""] if isinstance(content, Query) else []
        for part in content.parts:
            if isinstance(part, str):
                described.append(["text", part])
            elif part.path is None:
                described.append(["image", part.sha256])
            else:
                try:
                    about = part.path.stat()
                except OSError:
                    return None  # whoever reads it says what is wrong with it
                described.append(["file", str(part.path.absolute()), about.st_size, about.st_mtime_ns, about.st_ctime_ns])
                newest = max(newest, about.st_mtime_ns, about.st_ctime_ns)
        digest.update(json.dumps(described).encode() + b"\n")
    return digest.hexdigest() if newest and time.time_ns() - newest > YOUNG_NS else None
