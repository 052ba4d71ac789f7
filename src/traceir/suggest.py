"""Did you mean: the known name nearest to one that is unknown, in messages and on the command line."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any, Final, NoReturn

_MEANT: Final = {
    "picture": "image", "pictures": "image", "photo": "image", "img": "image", "words": "text", "string": "text",
    "both": "image,text", "text,image": "image,text", "image+text": "image,text", "find": "search", "query": "search",
    "delete": "rm", "remove": "rm", "eval": "evaluate", "server": "serve", "fast": "direct", "think": "reason",
}  # fmt: skip
"""Other words that people use, and ours."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)`, or nothing where no known name is near."""
    names = {name.lower(): name for name in known}
    word = name.strip().lower()
    meant = _MEANT.get(word, word)
    near = [meant] if meant in names else get_close_matches(word, names, n=1)
    return f" (did you mean {names[near[0]]!r}?)" if near else ""


class Parser(argparse.ArgumentParser):
    """An argument parser that names the nearest verb, choice or option for one that it does not have."""

    words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does it, but what a verb does not know is told by the parser of that verb."""
        self.words = _joined(sys.argv[1:] if args is None else args)
        known, unknown = super().parse_known_args(self.words, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, unknown

    def error(self, message: str) -> NoReturn:
        known = [name for name in self._option_string_actions if name.startswith("--")]
        options = [word.partition("=")[0] for word in self.words if word.startswith("--") and word != "--"]
        wrong = [option for option in options if not any(name.startswith(option) for name in known)]
        hints = [f"{option} is unknown{hint}" for option in wrong if (hint := did_you_mean(option, known))]
        super().error("; ".join([message, *hints]))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            names = [str(name) for name in action.choices]
            hint = _below(str(value), action) or did_you_mean(str(value), names)
            raise argparse.ArgumentError(action, f"{value!r} is unknown{hint}; choose one of {', '.join(names)}")


def _joined(words: Sequence[str]) -> list[str]:
    """The words with `--sort -date` as `--sort=-date`, since argparse takes -date for an option."""
    joined: list[str] = []
    for word in words:
        if joined[-1:] == ["--sort"] and re.match("-[^-].", word):
            joined[-1] = f"--sort={word}"
        else:
            joined.append(word)
    return joined


def _below(verb: str, action: argparse.Action) -> str:
    """The hint for a verb that is given without the one it belongs to, as in `add` for `index add`."""
    verbs = action.choices.items() if isinstance(action, argparse._SubParsersAction) else ()
    for name, parser in verbs:
        for own in parser._actions:
            if isinstance(own, argparse._SubParsersAction) and {verb, _MEANT.get(verb)} & set(own.choices):
                return f" (did you mean '{name} {verb if verb in own.choices else _MEANT[verb]}'?)"
    return ""
