"""What `traceir serve` and `traceir keys ...` do. Like all verbs these import what they need when they run."""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from traceir.cli.terminal import check_model_options, open_encoder, split
from traceir.errors import InputError
from traceir.serve.config import ServeConfig

if TYPE_CHECKING:
    from traceir.search import EncoderLike


def serve(args: argparse.Namespace) -> int:
    """The options bear the names of the fields of ServeConfig."""
    options: dict[str, Any] = {field.name: getattr(args, field.name) for field in fields(ServeConfig)}
    options |= {name: tuple(value) for name, value in options.items() if isinstance(value, list)}
    config = ServeConfig(**options)
    check_model_options(args)
    if args.keys is not None and not args.keys.is_file():
        raise InputError(f"--keys {args.keys} is not there; make it with `traceir keys add NAME --file {args.keys}`")
    try:
        from traceir.serve.run import serve
    except ImportError as error:
        raise InputError(f"serving needs more packages ({error}); pip install 'traceir[serve]'") from error
    load = partial(open_encoder, args, in_flight=args.capacity)
    serve(config, load, partial(print, flush=True), open_browser=args.open)
    return 0


def serve_demo(index: str, encoder: EncoderLike) -> int:
    """The gallery of the demonstration on a page, until Ctrl-C."""
    from traceir.serve.run import serve

    config = ServeConfig(index=index, title="TraceIR, the gallery of the demonstration")
    serve(config, lambda: encoder, lambda line: print(f"{line} (Ctrl-C ends it)", flush=True), open_browser=True)
    return 0


def keys_add(args: argparse.Namespace) -> int:
    from traceir.serve.keys import make_key

    limits = {"tenant": args.tenant, "days": args.days, "requests_per_minute": args.requests_per_minute}
    print(make_key(Path(args.file), args.name, scopes=split(args.scopes), **limits))
    return 0


def keys_list(args: argparse.Namespace) -> int:
    from traceir.serve.keys import list_keys

    for key in list_keys(Path(args.file)):
        rest = f"tenant {key.tenant or '-'}  created {key.created}  expires {key.expires or 'never'}"
        print(f"{key.name:<24} {','.join(key.scopes):<11} {rest}")
    return 0


def keys_revoke(args: argparse.Namespace) -> int:
    from traceir.serve.keys import revoke_key

    revoke_key(Path(args.file), args.name)
    print(f"revoked {args.name}")
    return 0
