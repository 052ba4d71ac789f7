"""How large the package is, at two revisions: `python -m benchmarks.size --before REVISION [--after HEAD]`.

Lines are those of `git ls-files | xargs wc -l`; words of the guides those of `wc -w`. The core is every module at the top of the
package and `collection`, `retrieval`, `index`, `serve`, `engines` and `integrations`.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import PurePosixPath

CORE = ("top", "collection", "engines", "index", "integrations", "retrieval", "serve")
GUIDES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")
PAGE_CODE = (".js", ".css", ".html")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="REVISION")
    parser.add_argument("--after", default="HEAD", metavar="REVISION")
    options = parser.parse_args()
    before, after = measured(options.before), measured(options.after)
    print(f"| | {options.before} | {options.after} |\n|---|---|---|")
    for name in [*dict.fromkeys([*before, *after])]:
        print(f"| {name} | {before.get(name, '')} | {after.get(name, '')} |")
    return 0


def measured(revision: str) -> dict[str, str]:
    """What is printed of one revision, by its name."""
    packages, longest = Counter[str](), (0, "")
    tests = pages = words = 0
    for path, text in files(revision):
        lines = text.count("\n")
        if path.parts[:2] == ("src", "traceir"):
            if path.suffix == ".py":
                packages[path.parts[2] if len(path.parts) > 3 else "top"] += lines
                longest = max(longest, *((length, f"{path}: {name}") for name, length in functions(text)), (0, ""))
                packages["largest file"] = max(packages["largest file"], lines)
            pages += lines * (path.suffix in PAGE_CODE)
        elif path.parts[0] == "tests" and path.suffix == ".py":
            tests += lines
        elif str(path) in GUIDES or (path.parts[0] == "docs" and len(path.parts) == 2 and path.suffix == ".md"):
            words += len(text.split())
    largest = packages.pop("largest file")
    rows = {f"src, {name}": str(lines) for name, lines in sorted(packages.items())}
    return {
        "src": str(packages.total()),
        "core": str(sum(packages[name] for name in CORE)),
        **rows,
        "page code": str(pages),
        "tests": str(tests),
        "guides, words": str(words),
        "largest file": str(largest),
        "largest function": f"{longest[0]} ({longest[1]})",
        "class names that stand twice": str(twice(revision)),
    }


def files(revision: str) -> Iterator[tuple[PurePosixPath, str]]:
    """The text files of a revision."""
    names = git("ls-tree", "-r", "--name-only", revision).splitlines()
    wanted = [name for name in names if PurePosixPath(name).suffix in {".py", ".md", *PAGE_CODE}]
    for name in wanted:
        yield PurePosixPath(name), git("show", f"{revision}:{name}")


def functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


def twice(revision: str) -> int:
    paths_of = defaultdict[str, set[str]](set)
    for path, text in files(revision):
        if path.parts[:2] == ("src", "traceir") and path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef):
                    paths_of[node.name].add(str(path))
    return sum(len(paths) > 1 for paths in paths_of.values())


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], stdout=subprocess.PIPE, check=True, encoding="utf-8", errors="replace").stdout


if __name__ == "__main__":
    sys.exit(main())
