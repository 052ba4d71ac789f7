"""The command line of `traceir` as tables: verbs, options, defaults and help. What a verb does is in the modules `*_verbs`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from traceir import __version__
from traceir.checkpoint import MODEL_VARIABLE
from traceir.cli import cot_verbs, index_verbs, learn_verbs, search_verbs, serve_verbs
from traceir.cli.terminal import ENGINE_KEY_VARIABLE
from traceir.suggest import Parser

# Copies, so that the parser imports nothing heavy; tests/test_cli.py holds them to the originals.
ROUTES: Final = ("auto", "reason", "direct")
MODALITIES: Final = ("image", "text", "image,text")
REPORTS: Final = ("steps", "routing", "routes", "scoreboard", "examples")
PRESETS: Final = tuple(
    "mini mini-naming mini-words mini-lessons mini-direct mini-direct-long ablation small-naming small-words small-lessons "
    "ablation-small middle-naming middle-words middle-lessons ablation-middle emoji qwen2-vl-2b qwen2.5-vl-3b qwen2.5-vl-7b "
    "qwen3-vl-2b qwen3-vl-4b qwen3-vl-8b qwen3.5-2b qwen3.5-4b".split()
)
SCALES: Final = ("small", "full")
STORES: Final = ("float32", "float16", "int8")

Option = tuple[Sequence[str], Mapping[str, Any]]
"""Names and settings of one argument, as `add_argument` takes them."""


Run = Callable[[argparse.Namespace], int]
Verb = tuple[Run, str, tuple[Option, ...]]
"""What runs a verb (parsed arguments to exit code), its help, and its options in the order of the help."""


def verb(run: Run, help: str, *options: Option) -> Verb:
    return run, help, options


# Kinds of options


def option(*names: str, **settings: Any) -> Option:
    return names, settings


def text(name: str, metavar: str, help: str | None = None, **settings: Any) -> Option:
    return option(name, metavar=metavar, help=help, **settings)


def needed(name: str, metavar: str, help: str | None = None, **settings: Any) -> Option:
    return text(name, metavar, help, required=True, **settings)


def flag(name: str, help: str | None = None) -> Option:
    return option(name, action="store_true", help=help)


def repeated(name: str, metavar: str, help: str, **settings: Any) -> Option:
    return option(name, action="append", default=[], metavar=metavar, help=help, **settings)


def setting(help: str) -> Option:
    return repeated("--set", "KEY=VALUE", help, dest="settings")


def choice(name: str, choices: Sequence[str], help: str | None = None, default: str | None = None) -> Option:
    """One of some words, the first where none is given."""
    return option(name, choices=choices, default=default or choices[0], help=help)


def positive(text: str) -> int:
    """A whole number of at least 1."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def number(
    name: str, help: str | None, default: float | None, metavar: str, type: Callable[[str], float], **settings: Any
) -> Option:
    """A number whose default is named in its help."""
    shown = f"{help} (default: {default:g})" if help and default is not None else help
    return option(name, type=type, default=default, metavar=metavar, help=shown, **settings)


def count(name: str, help: str | None = None, default: int | None = None) -> Option:
    """A whole number of at least 1."""
    return number(name, help, default, "N", positive)


def whole(name: str, help: str | None, default: int, **settings: Any) -> Option:
    return number(name, help, default, "N", int, **settings)


def real(name: str, metavar: str, help: str | None, default: float | None = None, **settings: Any) -> Option:
    return number(name, help, default, metavar, float, **settings)


class _FormerName(argparse.Action):
    """The former name of a repeated option, accepted with a notice."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
        print(f"note: {option_string} is now called --{self.dest}", file=sys.stderr)
        setattr(namespace, self.dest, [*getattr(namespace, self.dest), values])


# Options that several verbs share

SEED: Final = option("--seed", type=int, default=0, metavar="N")
INDEX: Final = needed("--index", "DIR|URI")
JSON: Final = flag("--json", "one JSON object")
DATA: Final = needed("--data", "DIR", type=Path)
SCORED: Final = (
    needed("--out", "DIR", "folder for results.json and the outcome of each query", type=Path),
    option("--route", action="append", metavar="ROUTE[,ROUTE]", help="auto, reason, direct (default: auto)"),
)
SPLIT: Final = choice("--split", ("val", "test"), default="test")
KEY: Final = text("name", "NAME")
KEYS_FILE: Final = needed("--file", "FILE")
MADE: Final = (needed("--out", "DIR", type=Path), choice("--scale", SCALES), SEED)
EVALUATION: Final = "[LABEL=]FOLDER[:ROUTE]"
BUILD: Final = text("out", "OUT", "folder of the build")
DTYPES: Final = ("float32", "bfloat16")
MODEL: Final = (
    option(
        "--model",
        metavar="M",
        help="checkpoint folder or hub id, with st: before it for sentence-transformers "
        f"(default: ${MODEL_VARIABLE}, else the bundled one)",
    ),
    count("--dim", "keep the first N components, if the model is made for that"),
    text("--profile", "NAME|FILE.json", "how another project's checkpoint is prompted and read"),
    text("--device", "D", "torch device, for instance cuda (default: cpu)", default="cpu"),
    choice("--dtype", DTYPES, "of the weights (default: float32)"),
)
ENGINE: Final = option(
    "--engine",
    metavar="[FORM:]URL",
    help="SGLang server that runs the model, or FORM:URL of any /v1/embeddings that has one named M: vllm, infinity, openai, "
    f"... (docs/engines.md); its key in ${ENGINE_KEY_VARIABLE}",
)
MODEL_OR_ENGINE: Final = (*MODEL, ENGINE)
ASSEMBLY: Final = (
    choice("--format", ("parquet", "jsonl"), "of the data set (default: parquet)"),
    choice("--dropped", ("leave_out", "direct"), "dropped samples: left out (default), or taught as direct queries"),
    flag("--no-negatives", "leave out hard negatives"),
)


def query(words: str) -> Sequence[Option]:
    """What a query consists of; `words`: the help of its text."""
    return (
        option("words", nargs="*", metavar="TEXT", help=words),
        text("--text", "T", "the same as an option, for instance where it begins with a dash"),
        text("--image", "FILE", "a picture to search with"),
        text("--instruction", "I", "what kind of thing is wanted, in words"),
        option("--modality", choices=MODALITIES, metavar="image|text|image,text", help="the modality looked for (default: any)"),
    )


# The verbs

VERBS: Final[Mapping[str, Verb]] = {
    "index add": verb(
        index_verbs.add,
        "add folders, pictures, texts, .jsonl files or M-BEIR pools",
        text("paths", "PATH", "folder, picture, .txt, .md, or .jsonl of {id, text, image}", nargs="+"),
        needed("--index", "DIR|URI", "folder, milvus-lite:./FILE.db or http://HOST:19530/NAME; made if it is not there"),
        count("--batch", "items encoded and stored at a time", 64),
        count(
            "--workers",
            "encode by N workers of Ray, on the cluster of $RAY_ADDRESS or on this machine (default: in this process)",
        ),
        choice(
            "--store",
            STORES,
            "how a new index keeps vectors; float16 halves it, int8 takes a quarter of the memory (default: float32)",
        ),
        *MODEL_OR_ENGINE,
    ),
    "index info": verb(index_verbs.info, "describe an index", INDEX, JSON),
    "index rm": verb(index_verbs.remove, "remove items by id", INDEX, option("ids", nargs="+", metavar="ID")),
    "index build-ann": verb(index_verbs.build_ann, "build what `search --approximate` needs", INDEX),
    "index calibrate": verb(
        index_verbs.calibrate,
        "make `search --cutoff` possible: say nothing was found",
        INDEX,
        repeated(
            "--background",
            "PATH",
            "queries that nothing in it answers: .txt of one a line, .jsonl, or a folder of pictures; "
            "repeatable (default: background.txt of the model, or unlikely texts of our own)",
            type=Path,
        ),
        count("--count", "of these texts", 2000),
        text("--instruction", "I", "what the searches to come will carry, if they all do"),
        *MODEL_OR_ENGINE,
    ),
    "index copy": verb(
        index_verbs.copy,
        "copy an index into another, of any kind",
        text("source", "FROM", "index to read"),
        text("target", "TO", "index to write, made if it is not there"),
        count("--batch", "items written at a time", 500),
        choice("--store", STORES, "vectors of a new index (default: float32)"),
    ),
    "search": verb(
        search_verbs.search,
        "search an index by words, a picture, or both",
        INDEX,
        *query("words to search with, or what to change in the picture"),
        choice("--route", ROUTES, "who decides about reasoning (default: auto, the model)"),
        count("-k", "number of hits", 10),
        flag("--approximate", "faster on large indexes; needs `index build-ann`"),
        repeated("--where", "FIELD=VALUE", "only items whose field has the value; repeatable"),
        real(
            "--cutoff",
            "RATE",
            "leave out hits that this share of queries would get whose answer is not there, for instance "
            "0.01; needs `index calibrate`",
        ),
        JSON,
        *MODEL_OR_ENGINE,
    ),
    "explain": verb(
        search_verbs.explain,
        "show the prompt, its tokens, the pooling position and the route of an input",
        *query("the words of the input"),
        text("--completion", "TEXT", 'what the model should write before <|emb|> ("": nothing)'),
        flag("--candidate", "explain it as a candidate, not as a query"),
        *MODEL,
    ),
    "models": verb(
        search_verbs.models,
        "list the published models that are known, and what was verified how",
        flag("--json", "one JSON list"),
    ),
    "serve": verb(
        serve_verbs.serve,
        "serve search, embeddings and a page over HTTP",
        needed("--index", "DIR|URI", "index to search, made if it is not there"),
        text("--host", "H", "address to listen on (default: 127.0.0.1)", default="127.0.0.1"),
        whole("--port", "0 takes a free one", 8080),
        text("--keys", "FILE", "keys made by `traceir keys add`; needed beyond this machine", type=Path),
        repeated(
            "--images", "DIR", "folder whose pictures may be shown; repeatable (default: those of the indexed items)", type=Path
        ),
        option("--pictures", dest="images", action=_FormerName, type=Path, default=[], help=argparse.SUPPRESS),
        text("--uploads", "DIR", "where pictures sent with items are kept (default: in --index)", type=Path),
        repeated("--allow-host", "NAME", "a Host name to answer to; repeatable", dest="allow_hosts"),
        repeated("--cors", "ORIGIN", "pages of this origin may ask; repeatable"),
        repeated("--fetch-host", "HOST", "fetch pictures from here; repeatable", dest="fetch_hosts"),
        count("--requests-per-minute", "of one key", 6_000),
        count("--inputs-per-minute", "embedded for one key", 60_000),
        text("--audit", "FILE", "write who asked what, as hashes, into this log", type=Path),
        flag("--audit-contents", "write the words too; they are personal data"),
        count("--capacity", "inputs under way, then 429", 512),
        count("--writing", "queries that reason at a time", 64),
        whole("--remember", "encodings kept by content", 8192, dest="remembered"),
        real("--deadline", "S", "seconds for one request", 60.0, dest="deadline_s"),
        real("--cutoff", "RATE", "of searches that state none, as in `search`; needs `index calibrate`"),
        text("--name", "NAME", "name of the model for clients (default: traceir)", default="traceir", dest="model_name"),
        text("--title", "T", "title of the page (default: TraceIR)", default="TraceIR"),
        text("--instructions", "FILE", "what the page suggests instead of our own, one a line", type=Path),
        flag("--open", "open the page in a browser"),
        *MODEL_OR_ENGINE,
    ),
    "keys add": verb(
        serve_verbs.keys_add,
        "make a key and print it, this once",
        KEY,
        needed("--file", "FILE", "file of keys, made if it is not there"),
        text("--scopes", "A,B", "read, write (default: read)", default="read"),
        text("--tenant", "T", "the key sees this tenant's items alone"),
        real("--days", "N", "days it is valid (default: until revoked)"),
        count("--requests-per-minute"),
    ),
    "keys list": verb(serve_verbs.keys_list, "list the keys, without their secrets", KEYS_FILE),
    "keys revoke": verb(serve_verbs.keys_revoke, "revoke a key, also in a running server", KEY, KEYS_FILE),
    "evaluate": verb(
        learn_verbs.evaluate,
        "score a model on a folder in M-BEIR's layout",
        DATA,
        *SCORED,
        text("--rows", "A,B", "rows such as cirr_task7, or whole data sets such as cirr (default: all)"),
        count("--limit", "only the first N queries of each row"),
        SPLIT,
        choice("--pool", ("local", "global", "both"), "pools to rank in (default: local)"),
        choice(
            "--prompt",
            ("first", "seeded", "all"),
            "each row's first instruction, one drawn for each query, or the mean over all (default: first)",
        ),
        whole("--seed", "of --prompt seeded", 0),
        text("--cache", "DIR", "folder of embeddings, for any evaluations (default: OUT/embeddings)", type=Path),
        text("--shard", "I/N", "encode the I-th of N shares, from 0 (default: from RANK or SLURM variables, else all)"),
        choice("--on-error", ("stop", "skip"), "broken lines, missing pictures: stop, or leave out and tell"),
        flag("--dry-run", "look at the whole folder, count, time a sample; score nothing"),
        *MODEL,
    ),
    "unseen": verb(
        learn_verbs.unseen,
        "score a model on the 13 zero-shot columns, or those that are there",
        needed("--data", "DIR", "folder of the sets, laid out as in docs/unseen.md", type=Path),
        *SCORED,
        text("--columns", "A,B", "for instance circo,vist (default: all that are there)"),
        choice("--on-error", ("stop", "skip"), "missing pictures: stop, or leave out and tell"),
        text("--cache", "DIR", "folder of embeddings (default: OUT/embeddings)", type=Path),
        flag("--dry-run", "read all annotations, count, say what is missing; score nothing"),
        text("--circo-submission", "FILE.json", "write CIRCO's test submission instead of scoring", type=Path),
        *MODEL,
    ),
    "mteb": verb(
        learn_verbs.mteb,
        "score a model on mteb's tasks and benchmarks; the same command resumes",
        option("-b", "--benchmark", action="append", default=[], metavar="B", help='such as "MIEB(lite)"; repeatable'),
        option("-t", "--tasks", action="append", default=[], metavar="TASK[,TASK]", help="tasks by mteb's names; repeatable"),
        text("--tasks-from", "MODULE|FILE.py", "tasks of your own: subclasses of mteb's, found by -t, else all"),
        needed("--out", "DIR", "folder of results, as mteb keeps them", type=Path),
        text("--name", "OWNER/NAME", "of the model in the results (default: the hub id, or local/FOLDER)"),
        choice("--route", ROUTES, "of retrieval queries (default: auto); all else is direct"),
        count("--batch-size", "inputs in memory at a time", 64),
        flag("--dry-run", "list the tasks, and whose data are here; score nothing"),
        *MODEL_OR_ENGINE,
    ),
    "faithfulness": verb(
        learn_verbs.faithfulness,
        "is the reasoning used? swap it, blank it, give the label's",
        DATA,
        needed("--out", "DIR", "folder for faithful.json and faithful.md", type=Path),
        text("--rows", "A,B", "rows or whole data sets (default: all that hold labelled reasoning)"),
        count("--limit", "only the first N complex queries of each row"),
        SPLIT,
        *MODEL,
    ),
    "report": verb(
        learn_verbs.report,
        "tables and plots from evaluation folders",
        option(
            "kind",
            choices=REPORTS,
            help="steps: recall by reasoning steps; routing; routes: the cost of each; scoreboard: all "
            "rows, published figures, plots; examples: hits and misses with pictures",
        ),
        option("folders", nargs="+", metavar=EVALUATION, help="what `traceir evaluate --out` wrote"),
        text("--out", "FILE.md", "write the report here too, plots beside it", type=Path),
        text("--data", "DIR", "examples only: the folder that was evaluated", type=Path),
    ),
    "compare": verb(
        learn_verbs.compare,
        "what one evaluation won and lost against another, query by query",
        text("first", EVALUATION, "what `traceir evaluate --out` wrote"),
        text("second", EVALUATION, "another model, or another route of the same"),
        count("-k", "depth of a hit (default: each row's own)"),
        count("--shown", "won and lost queries to name", 5),
        text("--out", "FILE.md", "write it here too", type=Path),
    ),
    "minibeir build": verb(
        learn_verbs.minibeir_build,
        "write the benchmark; goes on where it was cut off",
        *MADE,
        count("--workers", "processes that draw pictures", 1),
    ),
    "minibeir sheet": verb(
        learn_verbs.minibeir_sheet,
        "draw a contact sheet of a folder's queries and answers",
        DATA,
        needed("--out", "FILE", "a .png file", type=Path),
    ),
    "minibeir unseen": verb(learn_verbs.minibeir_unseen, "write the 13 zero-shot columns in miniature", *MADE),
    "reasoning build": verb(
        cot_verbs.build,
        "assess, reason, filter, verify; the same command resumes",
        needed("--data", "DIR", "folder in M-BEIR's layout"),
        needed("--out", "OUT", "folder of the build"),
        text("--teacher", "URL", "OpenAI-compatible base URL, recorded:FILE.jsonl or batch:FOLDER"),
        text("--model", "NAME", "model the teacher serves"),
        text("--verifier", "URL", "another address for the verifier (default: the teacher's)"),
        text("--verifier-model", "NAME", "another model for the verifier (default: the teacher's)"),
        text("--key-variable", "VAR", "variable that holds the key (default: OPENAI_API_KEY)", default="OPENAI_API_KEY"),
        text("--tasks", "A,B", "tasks such as cirr_task7 (default: all)"),
        text("--direct", "A,B", "tasks that are direct unasked"),
        text("--complex", "A,B", "tasks that are complex unasked"),
        text("--captions", "FILE.jsonl", "picture captions for the rules: img_path, caption"),
        text("--templates", "FILE.json", "prompts of your own, by name"),
        text("--shard", "i/N", "do this share of the parts (default: 0/1)", default="0/1"),
        choice("--engine", ("local", "ray"), "ray: spread the parts over a Ray cluster"),
        count("--workers", "workers of the Ray engine", 2),
        count("--concurrency", "requests in flight", 16),
        real("--requests-per-minute", "N", None),
        real("--tokens-per-minute", "N", None),
        real("--timeout", "S", "seconds to wait for a reply", 120.0),
        option("--price-in", type=float, default=0.0, metavar="USD", help="for a million prompt tokens"),
        option("--price-out", type=float, default=0.0, metavar="USD", help="for a million tokens of replies"),
        real("--spend-limit", "USD", "stop before this is spent; needs the prices"),
        whole("--patience", "stop after N replies to a stage of which none is of use; 0: go on", 24),
        text("--journal", "DIR", "folder of answers, to share among builds (default: OUT/journal)"),
        text("--extra", "JSON", "an object that goes into every request body"),
        flag("--dry-run", "estimate requests, tokens and money; ask nothing"),
        option(
            "--complex-share", type=float, default=0.525, metavar="SHARE", help="for the estimate (default: the paper's 0.525)"
        ),
        flag("--no-assemble", "leave the data set for `reasoning assemble`"),
        setting("seed=1, attempts=3, verify_above=0.8, limits.reasoning_least=8; repeatable"),
        *ASSEMBLY,
    ),
    "reasoning assemble": verb(cot_verbs.assemble, "write the data set anew, with reviewers' decisions", BUILD, *ASSEMBLY),
    "reasoning import": verb(
        cot_verbs.import_answers,
        "take in the answers of a batch, for the next build",
        BUILD,
        text("files", "FILE", "output and error files of a batch API", nargs="+"),
        text("--journal", "DIR", "folder of answers (default: OUT/journal)"),
    ),
    "reasoning review": verb(
        cot_verbs.review,
        "open a page on which people judge samples",
        BUILD,
        text("--reviewer", "NAME", "who judges (default: the page asks)"),
        whole("--port", None, 8890),
        count("--per-stratum", "samples of each task and fate", 20),
        choice("--order", ("random", "doubt"), "doubt: the doubtful first"),
        SEED,
        flag("--no-browser", "print the address only"),
        flag("--agreement", "print how far reviewers agree, and do nothing else"),
    ),
    "reasoning report": verb(
        cot_verbs.report,
        "quality and bias of what was built, as a page",
        BUILD,
        text("--to", "DIR", "folder of the page (default: OUT/quality)"),
    ),
    "reasoning push": verb(
        cot_verbs.push,
        "upload the data set to the hub, with its card",
        BUILD,
        needed("--repo", "NAME", "OWNER/NAME on the hub"),
        flag("--private"),
        flag("--dry-run", "check and list the files; upload nothing"),
    ),
    "reasoning teacher": verb(
        cot_verbs.teacher,
        "serve a scripted teacher that knows a folder's truth",
        needed("--data", "DIR", "MiniBEIR, or any folder in M-BEIR's layout"),
        option("--host", default="127.0.0.1", metavar="H"),
        whole("--port", None, 8891),
        text("--model", "NAME", "name it serves (default: scripted-oracle)", default="scripted-oracle"),
        text("--key", "KEY", "ask for this key (default: none)"),
        real("--faults", "SHARE", "share of replies with a fault", 0.0),
        real("--latency", "S", "seconds before a reply", 0.0),
        real("--stall", "S", "seconds a stalled request hangs", 5.0),
        text("--log", "FILE.jsonl", "write every request here"),
        option("--seed", type=int, default=0, metavar="N", help="of the faults"),
    ),
    "train": verb(
        learn_verbs.train,
        "train a model; the same command again resumes",
        option("--preset", required=True, choices=PRESETS),
        text("--data", "DIR", "folder in M-BEIR's layout (default: the preset's)"),
        text("--out", "DIR", "folder of the run (default: the preset's)"),
        text("--init", "MODEL", "checkpoint to start from, or random (default: the preset's)"),
        option("--card", type=int, choices=(24, 80), help="fit the chunks to one card of so many GiB (LoRA presets)"),
        setting("override a field: steps=500, size.hidden=128, weights.cirr_task7=4; repeatable"),
        text("--resume-from", "STEPDIR", "start at another run's steps/NNNNNN", type=Path),
    ),
    "ablate": verb(
        learn_verbs.ablate,
        "test the paper's claims in miniature; the same command again resumes",
        option("tables", nargs="?", default="all", metavar="TABLE[,TABLE]", help="table4, share, ... (default: all)"),
        text("--out", "DIR", "folder of the runs; the same one twice shares the work"),
        text("--data", "DIR", "folder in M-BEIR's layout (default: the preset's)"),
        text("--seeds", "N,N", "seeds of every variant (default: 0,1,2)", default="0,1,2"),
        count("--jobs", "processes that work side by side", 1),
        text("--report", "DIR", "write pages, plots and runs.json here"),
        flag("--report-only", "run nothing; report what is there"),
        setting("override a field of the base configuration; repeatable"),
        flag("--list", "name the tables and their runs, and do nothing"),
    ),
    "merge": verb(
        learn_verbs.merge,
        "make an adapter and its base one plain checkpoint",
        text("adapter", "ADAPTER", "adapter folder, such as RUN/checkpoint, or hub id"),
        needed("--out", "DIR", "folder of the checkpoint; must not exist yet", type=Path),
        choice("--dtype", DTYPES, "stored weights (default: float32; bfloat16 rounds)"),
    ),
    "push": verb(
        learn_verbs.push,
        "upload a checkpoint or adapter to the hub, with a model card",
        text("folder", "FOLDER", "what training, `traceir merge` or both have made", type=Path),
        needed("--repo", "NAME", "OWNER/NAME on the hub, made if it is not there"),
        text("--run", "RUN", "folder of the training, for the card", type=Path),
        repeated(
            "--evaluation", "DIR", "what `traceir evaluate --out` wrote for this very folder, for the card; repeatable", type=Path
        ),
        text("--licence", "ID", "the hub's word for it, such as apache-2.0"),
        text("--revision", "BRANCH", "branch to upload to (default: main)"),
        flag("--private", "only you can see it; refused where a public one exists"),
        flag("--dry-run", "write the card, check and list the files; upload nothing"),
    ),
    "demo": verb(
        search_verbs.demo,
        "search a small gallery in every way, and write a contact sheet",
        option("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="working folder (default: out/demo)"),
        choice(
            "--serve",
            ("no", "yes", "terminal"),
            "then serve the gallery with its page; terminal: only where somebody sits at one (default: no)",
        ),
        *MODEL,
    ),
}

GROUPS: Final = {
    "index": "fill, describe, prune an index",
    "keys": "make, list and revoke keys for `traceir serve`",
    "minibeir": "build and look at the benchmark in miniature",
    "reasoning": "make M-BEIR-CoT with a teacher: build, review, report",
}
FORMER_NAMES: Final = {"index optimise": "index build-ann"}
"""Verbs that were renamed: accepted with a notice, and not shown in any help."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy. The parsed arguments name what runs the verb as `verb`."""
    parser = Parser(prog="traceir", description="Universal multimodal retrieval that thinks when a query needs it.")
    parser.add_argument("--version", action="version", version=f"traceir {__version__}")
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for where in (parser, shared):
        where.add_argument("--threads", type=positive, metavar="N", help="CPU threads for the model (default: torch's choice)")
        where.add_argument("-v", "--verbose", action="store_true", help="log what happens; show tracebacks")
    parts: dict[str, Any] = {"": parser.add_subparsers(title="verbs", required=True, metavar="VERB")}
    for name in [*VERBS, *FORMER_NAMES]:
        group, _, word = name.rpartition(" ")
        if group not in parts:
            parts[group] = parts[""].add_parser(group, help=GROUPS[group]).add_subparsers(required=True, metavar="VERB")
        run, help, options = VERBS[FORMER_NAMES.get(name, name)]
        shown, notice = ({"help": help}, None) if name in VERBS else ({}, f"`{name}` is now called `{FORMER_NAMES[name]}`")
        own = parts[group].add_parser(word, description=help, parents=[shared], **shown)
        for names, settings in options:
            own.add_argument(*names, **settings)
        own.set_defaults(verb=run, notice=notice)
    return parser
