"""What the verbs of the command line share: the model they run on, and clean text for a terminal."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from traceir.errors import InputError, ModelError
from traceir.parser import ENGINE_KEY_VARIABLE, MODEL_VARIABLE

if TYPE_CHECKING:
    from traceir.encoder import Encoder
    from traceir.engines.sglang import SGLangEncoder

PARTLY: Final = 1
"""Exit code where some of the work failed."""
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def bundled_model() -> Path:
    """The checkpoint used where no `--model` is given: $TRACEIR_MODEL, else `models/mini` of the repository."""
    named = os.environ.get(MODEL_VARIABLE)
    if named:
        return Path(named)
    folder = Path(__file__).parents[2] / "models" / "mini"
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"there is no bundled checkpoint at {folder}; give --model DIR_OR_HUB_ID, or set {MODEL_VARIABLE}, "
            "or train one with `traceir train --preset mini`"
        )
    return folder


def model_name(args: argparse.Namespace) -> str:
    return str(args.model or bundled_model())


def load_encoder(args: argparse.Namespace, model: str | None = None) -> Encoder:
    """The encoder of `--model`; transformers keeps quiet unless asked."""
    name = model or model_name(args)
    import torch
    from transformers.utils import logging as transformers_logging

    from traceir.encoder import Encoder
    from traceir.model import load

    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.verbose:
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
    try:
        device = torch.device(args.device)
    except RuntimeError as error:
        raise InputError(f"--device {args.device!r} is unknown to torch; write for instance cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; leave --device out to run on the CPU")
    return Encoder(load(name, device=str(device), dtype=getattr(torch, args.dtype), profile=args.profile))


def open_encoder(args: argparse.Namespace, *, in_flight: int = 64) -> Encoder | SGLangEncoder:
    """The encoder over `--engine` where it is given, with so many requests in flight, else that of `--model` in this process."""
    if args.engine is None:
        return load_encoder(args)
    if args.profile is not None:
        raise InputError("--profile works in this process only; leave out --engine")
    from traceir.engines.sglang import SGLangEncoder

    key = os.environ.get(ENGINE_KEY_VARIABLE, "")
    return SGLangEncoder(args.engine, model_name(args), api_key=key, in_flight=in_flight)


def split(text: str) -> list[str]:
    """The parts of A,B,C."""
    return [part.strip() for part in text.split(",") if part.strip()]


def one_line(text: str) -> str:
    """One line without control characters, so that a stored text can neither break the layout nor steer a terminal."""
    return _CONTROL.sub(" ", text)


def clean_lines(text: str) -> str:
    return "\n".join(one_line(line) for line in text.split("\n"))


def shows_progress() -> bool:
    return sys.stderr.isatty()
