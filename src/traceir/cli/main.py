"""The command `traceir`: every verb of the project. Data go to stdout, progress and messages to stderr.

Each verb imports what it needs when it runs, so that `traceir --help` is instant. Exit codes: 0 done, 1 done in part or an
unexpected error, 2 an error that names its remedy, 130 interrupted, 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from traceir.cli.parser import build_parser
from traceir.cli.terminal import PARTLY, say
from traceir.errors import TraceError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; only argparse's own refusals leave by SystemExit."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    _soften(sys.stdout)
    say(args.notice)
    try:
        verb: Callable[[argparse.Namespace], int] = args.verb
        code = verb(args)
        sys.stdout.flush()
        return code
    except TraceError as error:
        return _fail(args, f"{error}", 2)
    except KeyboardInterrupt:
        return _fail(args, "interrupted", 130)
    except BrokenPipeError:
        # The reader has seen enough; what is still buffered goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        hint = "" if args.verbose else " (unexpected; run it again with -v for the traceback)"
        return _fail(args, f"{type(error).__name__}: {error}{hint}", PARTLY)


def _soften(stream: Any) -> None:
    """Characters that the terminal's encoding lacks are replaced, not fatal."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")


def _fail(args: argparse.Namespace, message: str, code: int) -> int:
    if args.verbose:
        traceback.print_exc()
    print(f"traceir: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
