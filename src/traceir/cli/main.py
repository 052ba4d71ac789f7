"""The command `traceir`: every verb of the project. Data go to stdout, progress and messages to stderr.

Verbs, options, defaults and help are in verbs.json: `run` is a function of the modules `*_verbs`, of which one is
imported when it runs, so that `traceir --help` is instant; an option is what add_argument takes, its `names` apart by spaces; a
text among the options stands for those of this name under `shared`. Exit codes: 0 done, 1 done in part or an unexpected error,
2 an error that names its remedy, 130 interrupted, 141 the reader of stdout went away.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import logging
import math
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from traceir import __version__
from traceir.cli.terminal import PARTLY, say
from traceir.errors import TraceError
from traceir.suggest import Parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code; only argparse's own refusals leave by SystemExit."""
    args = build_parser().parse_args(arguments)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO if args.verbose else logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # characters that the terminal's encoding lacks are not fatal
    say(args.notice)
    module, _, name = args.verb.rpartition(".")
    try:
        verb: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(f"traceir.cli.{module}"), name)
        code = verb(args)
        sys.stdout.flush()
        return code
    except TraceError as error:
        return _fail(args, f"{error}", 2)
    except KeyboardInterrupt:
        return _fail(args, "interrupted", 130)
    except BrokenPipeError:
        # The reader of stdout is gone; what is still buffered is dropped.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except Exception as error:
        hint = "" if args.verbose else " (unexpected; run it again with -v for the traceback)"
        return _fail(args, f"{type(error).__name__}: {error}{hint}", PARTLY)


def _fail(args: argparse.Namespace, message: str, code: int) -> int:
    if args.verbose:
        traceback.print_exc()
    print(f"traceir: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy. The parsed arguments name what runs the verb as `verb`."""
    table = json.loads(Path(__file__).with_name("verbs.json").read_text(encoding="utf-8"))
    parser = Parser(prog="traceir", description="Universal multimodal retrieval that thinks when a query needs it.")
    parser.add_argument("--version", action="version", version=f"traceir {__version__}")
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for where in (parser, common):
        where.add_argument("--threads", type=count, metavar="N", help="CPU threads for the model (default: torch's choice)")
        where.add_argument("-v", "--verbose", action="store_true", help="log what happens; show tracebacks")
    groups: dict[str, Any] = {"": parser.add_subparsers(title="verbs", required=True, metavar="VERB")}
    verbs = table["verbs"]
    # Verbs that were renamed: accepted with a notice, and not shown in any help.
    former = {verb["former"]: {**verb, "now": name} for name, verb in verbs.items() if "former" in verb}
    for name, verb in {**verbs, **former}.items():
        group, _, word = name.rpartition(" ")
        if group not in groups:
            added = groups[""].add_parser(group, help=table["groups"][group])
            groups[group] = added.add_subparsers(required=True, metavar="VERB")
        shown = {} if "now" in verb else {"help": verb["help"]}
        own = groups[group].add_parser(word, description=verb["help"], parents=[common], **shown)
        _add_options(own, verb["options"], table["shared"])
        own.set_defaults(verb=verb["run"], notice=f"`{name}` is now called `{verb['now']}`" if "now" in verb else None)
    return parser


def _add_options(parser: argparse.ArgumentParser, options: Sequence[Any], shared: Mapping[str, Sequence[Any]]) -> None:
    for option in options:
        if isinstance(option, str):
            _add_options(parser, shared[option], shared)
            continue
        settings = {key: _WORDS.get(value, value) if key in ("type", "action") else value for key, value in option.items()}
        if option.get("action") in ("append", "former_name"):
            settings["default"] = []
        if option.get("action") == "former_name":
            settings["help"] = argparse.SUPPRESS  # which argparse knows by identity
        parser.add_argument(*settings.pop("names").split(), **settings)


def count(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def cosine(text: str) -> float:
    """A number; what it may be is checked where it is used."""
    try:
        return float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no number; put the words before it, or write --fold=0.97") from error


def seconds(text: str) -> float:
    """A number of seconds above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return number


class _FormerName(argparse.Action):
    """The former name of a repeated option, accepted with a notice."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        say(f"{option_string} is now called --{self.dest}")
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


_WORDS: Final[Mapping[str, Any]] = {
    "int": int,
    "float": float,
    "path": Path,
    "count": count,
    "cosine": cosine,
    "seconds": seconds,
    "former_name": _FormerName,
}
"""What `type` and `action` name in verbs.json; other actions are argparse's own."""

if __name__ == "__main__":
    sys.exit(main())
