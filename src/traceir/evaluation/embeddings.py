"""Embeddings on disk: encoded once, block by block, by any number of processes, and never again.

Inputs (Items, or Queries by one route) are cut in the order given into blocks of fixed size. A block is what is encoded in one
call, what is written at once, and what a lost process loses at most. It is named by the hash of the contents it holds, so that
equal pools of two folders share it, and an input that changes makes its block another one. Which process encodes a block has no
influence on what is in it.

    ROOT/candidates-MODEL-DIGEST/        or queries-ROUTE-MODEL-DIGEST
      manifest.json                      the Maker: all that decides a vector beside the content
      blocks/KEY/vectors.npy             [n, D], float32 or float16
      blocks/KEY/encodings.jsonl         queries only: route, reasoning, tokens, emb_probability, truncated, one line a vector
      blocks/KEY/block.json              rows, and the seconds that encoding took
      known/SIGNATURE                    a KEY, so that pictures need not be read to know it
      writing/                           blocks on their way; what lies here an hour is removed

A block is written below `writing/` and its folder renamed: it is there as a whole or not at all.

The key of a picture is the SHA-256 of its file, which costs one reading. Each block's reading is done once: beside its key a
signature is kept, made of texts and of path, size, modification and change time of each picture file, which costs one `stat` a
picture. A file is thus taken for unchanged as git and make take it, and more strictly, because programs cannot set the change
time back. Files changed within the last seconds are not trusted to their times. Copied folders have new times and are read again.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, field, fields
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from traceir.errors import InputError, ModelError, StoreError
from traceir.items import ROUTES, Encoding, Item, Query, Route, Vector
from traceir.search import EncoderLike

log = logging.getLogger(__name__)

Input = TypeVar("Input", Item, Query)
Matrix = npt.NDArray[np.floating[Any]]
Shard = tuple[int, int]

FORMAT: Final = 1
CANDIDATE_ROWS: Final = 4096
QUERY_ROWS: Final = 512
ABANDONED_SECONDS: Final = 3600.0
YOUNG_NS: Final = 2_000_000_000
"""A file changed twice within the resolution of its times looks unchanged; younger files are read instead."""

_KEY = re.compile(r"[0-9a-f]{64}")
_ENCODING_FIELDS: Final = ("route", "reasoning", "tokens", "emb_probability", "truncated")


@dataclass(frozen=True, slots=True)
class Maker:
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

    def __post_init__(self) -> None:
        if self.route is not None and self.route not in ROUTES:
            raise InputError(f"route {self.route!r} is unknown; choose one of {', '.join(ROUTES)}, or None for candidates")
        if self.route is None and (self.threshold is not None or self.max_reasoning_tokens is not None):
            raise InputError("candidates never reason; give a threshold or a budget of reasoning tokens with a route only")
        if self.dtype not in ("float32", "float16"):
            raise InputError(f"dtype {self.dtype!r} is unknown; choose float32 or float16")
        if self.width < 1:
            raise InputError(f"width is {self.width}; vectors have at least one component")

    @classmethod
    def of(cls, encoder: EncoderLike, route: Route | None = None, **settings: Any) -> Maker:
        """The Maker of an encoder's vectors; `settings` are the further fields."""
        return cls(encoder.fingerprint, encoder.prompt_version, encoder.width, route, **settings)

    @property
    def kind(self) -> str:
        return "candidates" if self.route is None else f"queries-{self.route}"

    @property
    def described(self) -> dict[str, Any]:
        """All fields, as the manifest holds them."""
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"more": dict(self.more)}

    @property
    def folder(self) -> str:
        """A folder name that no Maker with other fields has."""
        digest = hashlib.sha256(json.dumps(self.described, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{re.sub(r'[^A-Za-z0-9]+', '_', self.fingerprint)[:40]}-{digest[:12]}"


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a plan: its number from 0, its rows, and its key; the key is None where another process is to know it."""

    number: int
    rows: int
    key: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The blocks of one sequence of inputs, in order."""

    blocks: tuple[Block, ...]

    @property
    def rows(self) -> int:
        return sum(block.rows for block in self.blocks)


class EmbeddingStore:
    """The embeddings of one Maker below `root`. Any number of processes may fill and read one folder at once."""

    def __init__(self, root: Path | str, maker: Maker, *, block_rows: int | None = None) -> None:
        self.maker = maker
        self.block_rows = block_rows or (CANDIDATE_ROWS if maker.route is None else QUERY_ROWS)
        if self.block_rows < 1:
            raise InputError(f"block_rows is {block_rows}; a block has at least 1 row")
        self.folder = Path(root) / maker.folder
        for name in ("blocks", "known", "writing"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._check_manifest()

    def fill(
        self,
        inputs: Iterable[Input],
        encode: Callable[[Sequence[Input]], Sequence[Encoding]],
        *,
        shard: Shard = (0, 1),
        repair: bool = False,
        progress: bool = True,
    ) -> Plan:
        """Encodes what is not there yet of the blocks whose number % n is i, for `shard` (i, n).

        `inputs` are taken one block at a time; pictures of blocks of other shards are not touched. `repair` reads the blocks that
        are there and encodes damaged ones again; without it a damaged header is a StoreError, and what lies behind it is checked
        when it is read. The keys in the returned plan are those of this shard.
        """
        mine, shards = check_shard(shard)
        self._remove_abandoned()
        blocks: list[Block] = []
        total = _own_rows(len(inputs), self.block_rows, shard) if isinstance(inputs, Sized) else None
        with tqdm(total=total, desc=self.maker.kind, unit=" inputs", disable=not progress, mininterval=2.0) as bar:
            for number, chunk in enumerate(_cut(inputs, self.block_rows)):
                key = self._key(chunk) if number % shards == mine else None
                blocks.append(Block(number, len(chunk), key))
                if key is None:
                    continue
                if self._is_there(key, len(chunk), repair):
                    bar.total = None if bar.total is None else bar.total - len(chunk)  # rates are those of the encoder
                    continue
                started = time.perf_counter()
                encodings = encode(chunk)
                self._write(key, chunk, encodings, time.perf_counter() - started)
                bar.update(len(chunk))
        return Plan(tuple(blocks))

    def plan(self, inputs: Iterable[Input]) -> Plan:
        """The blocks these inputs are cut into, with all keys; reads the pictures of blocks not met before, else their `stat`."""
        return Plan(tuple(Block(n, len(chunk), self._key(chunk)) for n, chunk in enumerate(_cut(inputs, self.block_rows))))

    def missing(self, plan: Plan) -> list[int]:
        """Numbers of the blocks that are not encoded, or of which the plan does not know the key."""
        return [block.number for block in plan.blocks if block.key is None or not self._block(block.key).is_dir()]

    def open(self, plan: Plan) -> Embeddings:
        """The embeddings of a plan, read lazily. Raises StoreError where blocks are missing."""
        if missing := self.missing(plan):
            raise StoreError(
                f"{self.folder}: {len(missing)} of {len(plan.blocks)} blocks are not encoded (the first is number {missing[0]}); "
                "let every shard fill its blocks, then plan again"
            )
        return Embeddings(self, plan)

    def vectors(self, key: str, rows: int, *, whole: bool) -> Matrix:
        """The vectors of a block, memory-mapped [rows, D]. `whole` also reads them and refuses values that are not finite."""
        file = self._block(key) / "vectors.npy"
        try:
            vectors: Matrix = np.lib.format.open_memmap(file, mode="r")
            size = file.stat().st_size
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            raise self._damage(file, f"cannot be read ({error})") from error
        if vectors.dtype != np.dtype(self.maker.dtype) or vectors.shape != (rows, self.maker.width):
            wanted = f"{self.maker.dtype} [{rows}, {self.maker.width}]"
            raise self._damage(file, f"holds {vectors.dtype} {list(vectors.shape)}, not {wanted}")
        if size != vectors.nbytes + getattr(vectors, "offset", 0):
            raise self._damage(file, f"is {size} bytes long, which is not what its header says")
        if whole and not np.isfinite(vectors).all():
            raise self._damage(file, "holds values that are not finite")
        return vectors

    def side(self, key: str, rows: int) -> list[dict[str, Any]]:
        """The lines beside the vectors of a block of queries."""
        file = self._block(key) / "encodings.jsonl"
        try:
            lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise self._damage(file, f"cannot be read ({error})") from error
        if len(lines) != rows or any(not isinstance(line, dict) or set(line) != set(_ENCODING_FIELDS) for line in lines):
            raise self._damage(file, f"does not hold {rows} lines with {', '.join(_ENCODING_FIELDS)}")
        return lines

    def seconds(self, key: str) -> float:
        """What encoding a block took, wall time."""
        file = self._block(key) / "block.json"
        try:
            return float(json.loads(file.read_text(encoding="utf-8"))["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damage(file, f"cannot be read ({error})") from error

    def _block(self, key: str) -> Path:
        return self.folder / "blocks" / key

    def _is_there(self, key: str, rows: int, repair: bool) -> bool:
        if not self._block(key).is_dir():
            return False
        try:
            self.vectors(key, rows, whole=repair)
            if self.maker.route is not None:
                self.side(key, rows)
        except StoreError as error:
            if not repair:
                raise
            log.warning("%s; encoding it again", error)
            self._discard(self._block(key))
            return False
        return True

    def _key(self, chunk: Sequence[Input]) -> str:
        """The hash of a block's contents, looked up by its signature where that is known."""
        signature = _signature(chunk)
        known = self.folder / "known" / signature if signature is not None else None
        if known is not None and known.is_file():
            found = known.read_text(encoding="utf-8").strip()
            if _KEY.fullmatch(found):
                return found
        key = hashlib.sha256("\n".join(content.content_hash() for content in chunk).encode()).hexdigest()
        if known is not None:
            self._write_text(known, f"{key}\n")
        return key

    def _write(self, key: str, chunk: Sequence[Input], encodings: Sequence[Encoding], seconds: float) -> None:
        vectors = self._checked(chunk, encodings)
        scratch = self._scratch(key)
        scratch.mkdir()
        with (scratch / "vectors.npy").open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
            _sync(file)
        if self.maker.route is not None:
            lines = [{name: getattr(encoding, name) for name in _ENCODING_FIELDS} for encoding in encodings]
            with (scratch / "encodings.jsonl").open("w", encoding="utf-8", newline="\n") as side:
                side.writelines(json.dumps(line) + "\n" for line in lines)
                _sync(side)
        (scratch / "block.json").write_text(json.dumps({"rows": len(chunk), "seconds": round(seconds, 3)}) + "\n")
        try:
            os.replace(scratch, self._block(key))
        except OSError:
            shutil.rmtree(scratch)
            if not self._block(key).is_dir():  # else another process was first, with the same block
                raise

    def _checked(self, chunk: Sequence[Input], encodings: Sequence[Encoding]) -> Matrix:
        if len(encodings) != len(chunk):
            raise ModelError(f"the encoder returned {len(encodings)} encodings for {len(chunk)} inputs; report it")
        vectors = np.stack([encoding.vector for encoding in encodings])
        if vectors.shape[1:] != (self.maker.width,):
            raise ModelError(f"the encoder's vectors have shape {list(vectors.shape[1:])}, the store needs [{self.maker.width}]")
        with np.errstate(over="ignore"):
            stored: Matrix = vectors.astype(self.maker.dtype, copy=False)  # float16 ends at 65,504
        if not np.isfinite(stored).all():
            place = int(np.flatnonzero(~np.isfinite(stored).all(axis=1))[0])
            what = f"the vector of {chunk[place].id!r} is not finite as {self.maker.dtype}"
            raise ModelError(f"{what}; the checkpoint has diverged")
        return stored

    def _check_manifest(self) -> None:
        file = self.folder / "manifest.json"
        wanted = {"format": FORMAT, "block_rows": self.block_rows, "maker": self.maker.described}
        if not file.is_file():
            self._write_text(file, json.dumps(wanted, indent=1) + "\n")
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{file} cannot be read ({error}); remove {self.folder}, or restore the file") from error
        if found != wanted:
            names = sorted(name for name in wanted if not isinstance(found, dict) or found.get(name) != wanted[name])
            raise StoreError(
                f"{file}: {', '.join(names)} are {[found.get(name) for name in names] if isinstance(found, dict) else found!r}, "
                f"this run has {[wanted[name] for name in names]}; use the same settings, or another root"
            )

    def _remove_abandoned(self) -> None:
        """What processes killed while they wrote have left."""
        for path in (self.folder / "writing").iterdir():
            try:
                if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
            except FileNotFoundError:
                continue  # another process was faster

    def _discard(self, block: Path) -> None:
        grave = self._scratch(block.name)
        try:
            os.replace(block, grave)
        except FileNotFoundError:
            return
        shutil.rmtree(grave, ignore_errors=True)

    def _scratch(self, name: str) -> Path:
        return self.folder / "writing" / f"{name[:16]}-{os.getpid()}-{secrets.token_hex(4)}"

    def _write_text(self, file: Path, text: str) -> None:
        scratch = self._scratch(file.name)
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, file)

    def _damage(self, file: Path, what: str) -> StoreError:
        return StoreError(f"{file} {what}; fill with repair=True, or remove the folder {file.parent} and fill again")


class Embeddings:
    """The embeddings of one plan, in order, read from memory-mapped blocks; may be iterated any number of times."""

    def __init__(self, store: EmbeddingStore, plan: Plan) -> None:
        self._store = store
        self._blocks = [(block.key, block.rows) for block in plan.blocks if block.key is not None]
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
        if self._store.maker.route is None:
            raise InputError(f"{self._store.folder} holds candidates, which have vectors only; iterate over the blocks")
        for (key, rows), vectors in zip(self._blocks, self, strict=True):
            for line, vector in zip(self._store.side(key, rows), np.asarray(vectors, dtype=np.float32), strict=True):
                yield Encoding(vector=vector, **line)

    def matrix(self) -> Vector:
        """All vectors in memory, float32 [N, D]."""
        whole = np.empty((len(self), self._store.maker.width), dtype=np.float32)
        first = 0
        for vectors in self:
            whole[first : first + len(vectors)] = vectors
            first += len(vectors)
        return whole

    @property
    def seconds(self) -> float:
        """Wall time of encoding, added up over blocks, whichever process and run it was."""
        return sum(self._store.seconds(key) for key, _ in self._blocks)


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
    found = os.environ if environment is None else environment
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank not in found:
            continue
        values = [found.get(name, "") for name in (rank, count)]
        if not all(value.isdecimal() for value in values):
            raise InputError(f"{rank} is {values[0]!r} and {count} is {values[1]!r}; set both to numbers, or neither")
        return check_shard((int(values[0]), int(values[1])))
    return 0, 1


def _cut(inputs: Iterable[Input], rows: int) -> Iterator[list[Input]]:
    iterator = iter(inputs)
    while chunk := list(islice(iterator, rows)):
        yield chunk


def _own_rows(total: int, rows: int, shard: Shard) -> int:
    return sum(min(rows, total - first) for first in range(shard[0] * rows, total, shard[1] * rows))


def _signature(chunk: Sequence[Input]) -> str | None:
    """A hash of texts and of the times and sizes of picture files; None where hashing costs nothing or times prove nothing."""
    digest, files, newest = hashlib.sha256(), 0, 0
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
                files, newest = files + 1, max(newest, about.st_mtime_ns, about.st_ctime_ns)
        digest.update(json.dumps(described).encode() + b"\n")
    return digest.hexdigest() if files and time.time_ns() - newest > YOUNG_NS else None


def _sync(file: Any) -> None:
    """Bytes on disk before the rename that declares them there."""
    file.flush()
    os.fsync(file.fileno())
