"""What the verbs of the command line share: the model they run on, and clean text for a terminal."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import TYPE_CHECKING, Final

from traceir.checkpoint import bundled_model, check_model, fetch, hub_answers, is_hub_id, is_library, plain_name
from traceir.engines.forms import split_engine
from traceir.errors import InputError, ModelError, StoreError

if TYPE_CHECKING:
    from traceir.encoder import Encoder
    from traceir.library import LibraryEncoder
    from traceir.retrieval.search import EncoderLike

ENGINE_KEY_VARIABLE: Final = "TRACEIR_ENGINE_KEY"
PARTLY: Final = 1
"""Exit code where some of the work failed."""
DEVICES: Final = ("cpu", "cuda", "mps", "xpu", "hpu", "npu", "mtia", "xla")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def model_name(args: argparse.Namespace) -> str:
    return str(args.model or bundled_model())


def check_model_options(args: argparse.Namespace) -> None:
    """What can be told to be wrong with --model and --device before torch, which takes seconds, is imported.

    Raises InputError or ModelError.
    """
    if not is_endpoint(args):
        check_model(model_name(args))
    elif not args.model:
        raise InputError(f"--engine {args.engine}: name the model that is to answer there, by --model NAME")
    kind, _, number = args.device.partition(":")
    if kind not in DEVICES or (":" in args.device and not (number.isascii() and number.isdigit())):
        raise InputError(f"--device {args.device!r} is unknown to torch; write for instance cpu or cuda")


def is_endpoint(args: argparse.Namespace) -> bool:
    """Whether `--engine` is an endpoint of embeddings, whose --model is a name there and no checkpoint here."""
    return split_engine(getattr(args, "engine", None) or "")[0] is not None


def load_encoder(args: argparse.Namespace) -> Encoder | LibraryEncoder:
    """The encoder of `--model`, which `check_model_options` has passed; transformers keeps quiet unless asked."""
    if not args.verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if is_hub_id(name := plain_name(model_name(args))) and not hub_answers():
        fetch(name)  # where it is not in the cache either, that is said before seconds go into torch
    if not shows_progress():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import torch

    from traceir.library import load_encoder

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"--device {args.device}: torch has none here ({reason}); leave --device out to run on the CPU"
        ) from error
    dtype = getattr(torch, args.dtype)
    return load_encoder(model_name(args), device=args.device, dtype=dtype, profile=args.profile, dim=args.dim)


def load_own_encoder(args: argparse.Namespace) -> Encoder:
    """As `load_encoder`, for a verb that looks inside the model; ModelError for a model of sentence-transformers."""
    if args.profile is None and is_library(name := model_name(args)):
        raise ModelError(f"{name} is a model of sentence-transformers, of which this verb could see nothing but vectors")
    from traceir.encoder import Encoder

    encoder = load_encoder(args)
    assert isinstance(encoder, Encoder)
    return encoder


def open_encoder(args: argparse.Namespace, *, in_flight: int = 64, known: str = "") -> EncoderLike:
    """The encoder over `--engine` where it is given, with so many requests in flight, else that of `--model` in this process.

    `known`: the fingerprint that an endpoint of embeddings should have (default: what filled `--index`).
    """
    if args.engine is None:
        return load_encoder(args)
    if args.profile is not None:
        raise InputError("--profile works in this process only; leave out --engine")
    key = os.environ.get(ENGINE_KEY_VARIABLE, "")
    form, address = split_engine(args.engine)
    if form is not None:
        from traceir.engines.embeddings import EmbeddingsEncoder

        known = known or filled_by(args)
        return EmbeddingsEncoder(address, args.model, form, dim=args.dim, known=known, api_key=key, in_flight=in_flight)
    from traceir.engines.sglang import SGLangEncoder

    return SGLangEncoder(args.engine, model_name(args), dim=args.dim, api_key=key, in_flight=in_flight)


def filled_by(args: argparse.Namespace) -> str:
    """The fingerprint in `--index` that an endpoint of embeddings is compared with; "" where there is none, or no such engine.

    An index that cannot be read is told of where it is used.
    """
    from traceir.index import open_index

    index = getattr(args, "index", None)
    if not is_endpoint(args) or not index:
        return ""
    try:
        with open_index(index) as filled:
            return str(filled.info().fingerprint)
    except StoreError:
        return ""


def say(note: str | None) -> None:
    """A note on stderr, where there is one."""
    if note:
        print(one_line(f"note: {note}"), file=sys.stderr)


def split(text: str) -> list[str]:
    """The parts of A,B,C."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_shard(text: str) -> tuple[int, int]:
    """`I/N` with 0 <= I < N."""
    number, _, count = text.partition("/")
    if not re.fullmatch(r"[0-9]{1,9}/[0-9]{1,9}", text) or not int(number) < int(count):
        raise InputError(f"--shard {text[:80]!r} is not of the form I/N with I from 0 to N - 1; write 0/4 for the first of four")
    return int(number), int(count)


def one_line(text: str) -> str:
    """One line without control characters, so that a stored text can neither break the layout nor steer a terminal."""
    return _CONTROL.sub(" ", text)


def shows_progress() -> bool:
    return sys.stderr.isatty()
