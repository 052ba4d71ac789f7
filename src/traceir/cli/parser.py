"""The command line of `traceir` as argparse sees it: verbs, options, defaults and help. What a verb does is in `cli.py`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from traceir import __version__
from traceir.checkpoint import MODEL_VARIABLE
from traceir.suggest import Parser

# Copies, so that the parser imports nothing; tests/test_cli.py holds them to the originals.
ROUTES: Final = ("auto", "reason", "direct")
MODALITIES: Final = ("image", "text", "image,text")
REPORTS: Final = ("steps", "routing", "routes", "scoreboard", "examples")
PRESETS: Final = (
    "mini",
    "mini-naming",
    "mini-words",
    "mini-lessons",
    "mini-direct",
    "mini-direct-long",
    "ablation",
    "small-naming",
    "small-words",
    "small-lessons",
    "ablation-small",
    "middle-naming",
    "middle-words",
    "middle-lessons",
    "ablation-middle",
    "emoji",
    "qwen2-vl-2b",
    "qwen2.5-vl-3b",
    "qwen2.5-vl-7b",
    "qwen3-vl-2b",
    "qwen3-vl-4b",
    "qwen3-vl-8b",
    "qwen3.5-2b",
    "qwen3.5-4b",
)
SCALES: Final = ("small", "full")
ENGINE_KEY_VARIABLE: Final = "TRACEIR_ENGINE_KEY"

Run = Callable[[argparse.Namespace], int]
"""What runs a verb: parsed arguments to exit code."""


def assemble(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy.

    `runs` gives for every verb ("search", "index add") what runs it; the parsed arguments name it as `verb`.
    """
    parser = Parser(prog="traceir", description="Universal multimodal retrieval that thinks when a query needs it.")
    parser.add_argument("--version", action="version", version=f"traceir {__version__}")
    shared = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    for where in (parser, shared):
        where.add_argument("--threads", type=_count, metavar="N", help="CPU threads for the model (default: torch's choice)")
        where.add_argument("-v", "--verbose", action="store_true", help="log what happens; show tracebacks")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    _add_index(verbs, shared, runs)
    _add_search(verbs, shared, runs)
    _add_explain(verbs, shared, runs)
    _add_models(verbs, shared, runs)
    _add_serve(verbs, shared, runs)
    _add_keys(verbs, shared, runs)
    _add_evaluate(verbs, shared, runs)
    _add_unseen(verbs, shared, runs)
    _add_mteb(verbs, shared, runs)
    _add_faithfulness(verbs, shared, runs)
    _add_report(verbs, shared, runs)
    _add_compare(verbs, shared, runs)
    _add_minibeir(verbs, shared, runs)
    _add_reasoning(verbs, shared, runs)
    _add_train(verbs, shared, runs)
    _add_ablate(verbs, shared, runs)
    _add_merge(verbs, shared, runs)
    _add_push(verbs, shared, runs)
    _add_demo(verbs, shared, runs)
    return parser


# The parsers of the verbs


def _add_index(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    parts = verbs.add_parser("index", help="fill, describe, prune an index").add_subparsers(required=True, metavar="VERB")
    add = _verb(parts, shared, "add", runs["index add"], "add folders, pictures, texts, .jsonl files or M-BEIR pools")
    add.add_argument("paths", nargs="+", metavar="PATH", help="folder, picture, .txt, .md, or .jsonl of {id, text, image}")
    add.add_argument(
        "--index", required=True, metavar="DIR|URI",
        help="folder, milvus-lite:./FILE.db or http://HOST:19530/NAME; made if it is not there",
    )  # fmt: skip
    add.add_argument("--batch", type=_count, default=64, metavar="N", help="items encoded and stored at a time (default: 64)")
    add.add_argument(
        "--workers", type=_count, metavar="N",
        help="encode by N workers of Ray, on the cluster of $RAY_ADDRESS or on this machine (default: in this process)",
    )  # fmt: skip
    add.add_argument(
        "--store", choices=("float32", "float16", "int8"), default="float32",
        help="how a new index keeps vectors; float16 halves it, int8 takes a quarter of the memory (default: float32)",
    )  # fmt: skip
    _add_model(add)
    _add_engine(add)
    info = _verb(parts, shared, "info", runs["index info"], "describe an index")
    info.add_argument("--index", required=True, metavar="DIR|URI")
    info.add_argument("--json", action="store_true", help="one JSON object")
    remove = _verb(parts, shared, "rm", runs["index rm"], "remove items by id")
    remove.add_argument("--index", required=True, metavar="DIR|URI")
    remove.add_argument("ids", nargs="+", metavar="ID")
    for name, words in (("build-ann", "build what `search --approximate` needs"), ("optimise", "the former name of build-ann")):
        _verb(parts, shared, name, runs[f"index {name}"], words).add_argument("--index", required=True, metavar="DIR|URI")
    calibrate = _verb(
        parts, shared, "calibrate", runs["index calibrate"], "make `search --cutoff` possible: say nothing was found"
    )
    calibrate.add_argument("--index", required=True, metavar="DIR|URI")
    calibrate.add_argument(
        "--background", action="append", default=[], type=Path, metavar="PATH",
        help="queries that nothing in it answers: .txt of one a line, .jsonl, or a folder of pictures; repeatable "
        "(default: background.txt of the model, or unlikely texts of our own)",
    )  # fmt: skip
    calibrate.add_argument("--count", type=_count, default=2000, metavar="N", help="of these texts (default: 2000)")
    calibrate.add_argument("--instruction", metavar="I", help="what the searches to come will carry, if they all do")
    _add_model(calibrate)
    _add_engine(calibrate)
    copied = _verb(parts, shared, "copy", runs["index copy"], "copy an index into another, of any kind")
    copied.add_argument("source", metavar="FROM", help="index to read")
    copied.add_argument("target", metavar="TO", help="index to write, made if it is not there")
    copied.add_argument("--batch", type=_count, default=500, metavar="N", help="items written at a time (default: 500)")
    copied.add_argument(
        "--store", choices=("float32", "float16", "int8"), default="float32", help="vectors of a new index (default: float32)"
    )


def _add_search(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    search = _verb(verbs, shared, "search", runs["search"], "search an index by words, a picture, or both")
    search.add_argument("--index", required=True, metavar="DIR|URI")
    _add_query(search, "words to search with, or what to change in the picture")
    search.add_argument("--route", choices=ROUTES, default="auto", help="who decides about reasoning (default: auto, the model)")
    search.add_argument("-k", type=_count, default=10, metavar="N", help="number of hits (default: 10)")
    search.add_argument("--approximate", action="store_true", help="faster on large indexes; needs `index build-ann`")
    search.add_argument(
        "--where", action="append", default=[], metavar="FIELD=VALUE", help="only items whose field has the value; repeatable"
    )
    search.add_argument(
        "--cutoff", type=float, metavar="RATE",
        help="leave out hits that this share of queries would get whose answer is not there, for instance 0.01; needs "
        "`index calibrate`",
    )  # fmt: skip
    search.add_argument("--json", action="store_true", help="one JSON object")
    _add_model(search)
    _add_engine(search)


def _add_explain(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    explain = _verb(
        verbs, shared, "explain", runs["explain"], "show the prompt, its tokens, the read-out and the route of an input"
    )
    _add_query(explain, "the words of the input")
    explain.add_argument("--completion", metavar="TEXT", help='what the model should write before <|emb|> ("": nothing)')
    explain.add_argument("--candidate", action="store_true", help="explain it as a candidate, not as a query")
    _add_model(explain)


def _add_models(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    models = _verb(verbs, shared, "models", runs["models"], "list the published models that are known, and what was verified how")
    models.add_argument("--json", action="store_true", help="one JSON list")


def _add_serve(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    serve = _verb(verbs, shared, "serve", runs["serve"], "serve search, embeddings and a page over HTTP")
    serve.add_argument("--index", required=True, metavar="DIR|URI", help="index to search, made if it is not there")
    serve.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, default=8080, metavar="N", help="0 takes a free one (default: 8080)")
    serve.add_argument("--keys", type=Path, metavar="FILE", help="keys made by `traceir keys add`; needed beyond this machine")
    serve.add_argument(
        "--images", "--pictures", dest="images", action="append", default=[], type=Path, metavar="DIR",
        help="folder whose pictures may be shown; repeatable (default: those of the indexed items)",
    )  # fmt: skip
    serve.add_argument(
        "--uploads", type=Path, metavar="DIR", help="where pictures sent with items are kept (default: in --index)"
    )
    serve.add_argument("--allow-host", action="append", default=[], metavar="NAME", help="a Host name to answer to; repeatable")
    serve.add_argument("--cors", action="append", default=[], metavar="ORIGIN", help="pages of this origin may ask; repeatable")
    serve.add_argument("--fetch-host", action="append", default=[], metavar="HOST", help="fetch pictures from here; repeatable")
    serve.add_argument("--requests-per-minute", type=_count, default=6_000, metavar="N", help="of one key (default: 6000)")
    serve.add_argument(
        "--inputs-per-minute", type=_count, default=60_000, metavar="N", help="embedded for one key (default: 60000)"
    )
    serve.add_argument("--audit", type=Path, metavar="FILE", help="write who asked what, as hashes, into this log")
    serve.add_argument("--audit-contents", action="store_true", help="write the words too; they are personal data")
    serve.add_argument("--capacity", type=_count, default=512, metavar="N", help="inputs under way, then 429 (default: 512)")
    serve.add_argument("--writing", type=_count, default=64, metavar="N", help="queries that reason at a time (default: 64)")
    serve.add_argument("--remember", type=int, default=8192, metavar="N", help="encodings kept by content (default: 8192)")
    serve.add_argument("--deadline", type=float, default=60.0, metavar="S", help="seconds for one request (default: 60)")
    serve.add_argument(
        "--cutoff", type=float, metavar="RATE", help="of searches that state none, as in `search`; needs `index calibrate`"
    )
    serve.add_argument("--name", default="traceir", metavar="NAME", help="name of the model for clients (default: traceir)")
    serve.add_argument("--title", default="TraceIR", metavar="T", help="title of the page (default: TraceIR)")
    serve.add_argument("--instructions", type=Path, metavar="FILE", help="what the page suggests instead of our own, one a line")
    serve.add_argument("--open", action="store_true", help="open the page in a browser")
    _add_model(serve)
    _add_engine(serve)


def _add_keys(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    parts = verbs.add_parser("keys", help="make, list and revoke keys for `traceir serve`")
    parts = parts.add_subparsers(required=True, metavar="VERB")
    add = _verb(parts, shared, "add", runs["keys add"], "make a key and print it, this once")
    add.add_argument("name", metavar="NAME")
    add.add_argument("--file", required=True, metavar="FILE", help="file of keys, made if it is not there")
    add.add_argument("--scopes", default="read", metavar="A,B", help="read, write (default: read)")
    add.add_argument("--tenant", metavar="T", help="the key sees this tenant's items alone")
    add.add_argument("--days", type=float, metavar="N", help="days it is valid (default: until revoked)")
    add.add_argument("--requests-per-minute", type=_count, metavar="N")
    listed = _verb(parts, shared, "list", runs["keys list"], "list the keys, without their secrets")
    listed.add_argument("--file", required=True, metavar="FILE")
    revoke = _verb(parts, shared, "revoke", runs["keys revoke"], "revoke a key, also in a running server")
    revoke.add_argument("name", metavar="NAME")
    revoke.add_argument("--file", required=True, metavar="FILE")


def _add_evaluate(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    evaluate = _verb(verbs, shared, "evaluate", runs["evaluate"], "score a model on a folder in M-BEIR's layout")
    evaluate.add_argument("--data", required=True, metavar="DIR")
    evaluate.add_argument("--out", required=True, metavar="DIR", help="folder for results.json and the outcome of each query")
    evaluate.add_argument("--route", action="append", metavar="ROUTE[,ROUTE]", help="auto, reason, direct (default: auto)")
    evaluate.add_argument("--rows", metavar="A,B", help="rows such as cirr_task7, or whole data sets such as cirr (default: all)")
    evaluate.add_argument("--limit", type=_count, metavar="N", help="only the first N queries of each row")
    evaluate.add_argument("--split", choices=("val", "test"), default="test")
    evaluate.add_argument(
        "--pool", choices=("local", "global", "both"), default="local", help="pools to rank in (default: local)"
    )
    evaluate.add_argument(
        "--prompt", choices=("first", "seeded", "all"), default="first",
        help="each row's first instruction, one drawn for each query, or the mean over all (default: first)",
    )  # fmt: skip
    evaluate.add_argument("--seed", type=int, default=0, metavar="N", help="of --prompt seeded (default: 0)")
    evaluate.add_argument("--cache", metavar="DIR", help="folder of embeddings, for any evaluations (default: OUT/embeddings)")
    evaluate.add_argument(
        "--shard", metavar="I/N", help="encode the I-th of N shares, from 0 (default: from RANK or SLURM variables, else all)"
    )
    evaluate.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="broken lines, missing pictures: stop, or leave out and tell"
    )
    evaluate.add_argument("--dry-run", action="store_true", help="look at the whole folder, count, time a sample; score nothing")
    _add_model(evaluate)


def _add_unseen(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    unseen = _verb(verbs, shared, "unseen", runs["unseen"], "score a model on the 13 zero-shot columns, or those that are there")
    unseen.add_argument("--data", required=True, metavar="DIR", help="folder of the sets, laid out as in docs/unseen.md")
    unseen.add_argument("--out", required=True, metavar="DIR", help="folder for results.json and the outcome of each query")
    unseen.add_argument("--route", action="append", metavar="ROUTE[,ROUTE]", help="auto, reason, direct (default: auto)")
    unseen.add_argument("--columns", metavar="A,B", help="for instance circo,vist (default: all that are there)")
    unseen.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="missing pictures: stop, or leave out and tell"
    )
    unseen.add_argument("--cache", metavar="DIR", help="folder of embeddings (default: OUT/embeddings)")
    unseen.add_argument("--dry-run", action="store_true", help="read all annotations, count, say what is missing; score nothing")
    unseen.add_argument("--circo-submission", metavar="FILE.json", help="write CIRCO's test submission instead of scoring")
    _add_model(unseen)


def _add_mteb(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    mteb = _verb(verbs, shared, "mteb", runs["mteb"], "score a model on mteb's tasks and benchmarks; the same command resumes")
    mteb.add_argument("-b", "--benchmark", action="append", default=[], metavar="B", help='such as "MIEB(lite)"; repeatable')
    mteb.add_argument(
        "-t", "--tasks", action="append", default=[], metavar="TASK[,TASK]", help="tasks by mteb's names; repeatable"
    )
    mteb.add_argument(
        "--tasks-from", metavar="MODULE|FILE.py", help="tasks of your own: subclasses of mteb's, found by -t, else all"
    )
    mteb.add_argument("--out", required=True, metavar="DIR", help="folder of results, as mteb keeps them")
    mteb.add_argument("--name", metavar="OWNER/NAME", help="of the model in the results (default: the hub id, or local/FOLDER)")
    mteb.add_argument("--route", choices=ROUTES, default="auto", help="of retrieval queries (default: auto); all else is direct")
    mteb.add_argument("--batch-size", type=_count, default=64, metavar="N", help="inputs in memory at a time (default: 64)")
    mteb.add_argument("--dry-run", action="store_true", help="list the tasks, and whose data are here; score nothing")
    _add_model(mteb)
    _add_engine(mteb)


def _add_faithfulness(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    faithful = _verb(
        verbs, shared, "faithfulness", runs["faithfulness"], "is the reasoning used? swap it, blank it, give the label's"
    )
    faithful.add_argument("--data", required=True, metavar="DIR")
    faithful.add_argument("--out", required=True, metavar="DIR", help="folder for faithful.json and faithful.md")
    faithful.add_argument("--rows", metavar="A,B", help="rows or whole data sets (default: all that hold labelled reasoning)")
    faithful.add_argument("--limit", type=_count, metavar="N", help="only the first N complex queries of each row")
    faithful.add_argument("--split", choices=("val", "test"), default="test")
    _add_model(faithful)


def _add_report(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    parser = _verb(verbs, shared, "report", runs["report"], "tables and plots from evaluation folders")
    parser.add_argument(
        "kind",
        choices=REPORTS,
        help="steps: recall by reasoning steps; routing; routes: the cost of each; scoreboard: all rows, "
        "published figures, plots; examples: hits and misses with pictures",
    )
    parser.add_argument("folders", nargs="+", metavar="[LABEL=]FOLDER[:ROUTE]", help="what `traceir evaluate --out` wrote")
    parser.add_argument("--out", metavar="FILE.md", help="write the report here too, plots beside it")
    parser.add_argument("--data", metavar="DIR", help="examples only: the folder that was evaluated")


def _add_compare(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    compare = _verb(verbs, shared, "compare", runs["compare"], "what one evaluation won and lost against another, query by query")
    compare.add_argument("first", metavar="[LABEL=]FOLDER[:ROUTE]", help="what `traceir evaluate --out` wrote")
    compare.add_argument("second", metavar="[LABEL=]FOLDER[:ROUTE]", help="another model, or another route of the same")
    compare.add_argument("-k", type=_count, metavar="N", help="depth of a hit (default: each row's own)")
    compare.add_argument("--shown", type=_count, default=5, metavar="N", help="won and lost queries to name (default: 5)")
    compare.add_argument("--out", metavar="FILE.md", help="write it here too")


def _add_minibeir(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    parts = verbs.add_parser("minibeir", help="build and look at the benchmark in miniature")
    parts = parts.add_subparsers(required=True, metavar="VERB")
    build = _verb(parts, shared, "build", runs["minibeir build"], "write the benchmark; goes on where it was cut off")
    build.add_argument("--out", required=True, metavar="DIR")
    build.add_argument("--scale", choices=SCALES, default="small")
    build.add_argument("--seed", type=int, default=0, metavar="N")
    build.add_argument("--workers", type=_count, default=1, metavar="N", help="processes that draw pictures (default: 1)")
    sheet = _verb(parts, shared, "sheet", runs["minibeir sheet"], "draw a contact sheet of a folder's queries and answers")
    sheet.add_argument("--data", required=True, metavar="DIR")
    sheet.add_argument("--out", required=True, metavar="FILE", help="a .png file")
    unseen = _verb(parts, shared, "unseen", runs["minibeir unseen"], "write the 13 zero-shot columns in miniature")
    unseen.add_argument("--out", required=True, metavar="DIR")
    unseen.add_argument("--scale", choices=SCALES, default="small")
    unseen.add_argument("--seed", type=int, default=0, metavar="N")


def _add_reasoning(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    parts = verbs.add_parser("reasoning", help="make M-BEIR-CoT with a teacher: build, review, report")
    parts = parts.add_subparsers(required=True, metavar="VERB")
    _add_reasoning_build(parts, shared, runs)
    merge = _verb(parts, shared, "assemble", runs["reasoning assemble"], "write the data set anew, with reviewers' decisions")
    merge.add_argument("out", metavar="OUT", help="folder of the build")
    _add_assembly(merge)
    read = _verb(parts, shared, "import", runs["reasoning import"], "take in the answers of a batch, for the next build")
    read.add_argument("out", metavar="OUT", help="folder of the build")
    read.add_argument("files", nargs="+", metavar="FILE", help="output and error files of a batch API")
    read.add_argument("--journal", metavar="DIR", help="folder of answers (default: OUT/journal)")
    review = _verb(parts, shared, "review", runs["reasoning review"], "open a page on which people judge samples")
    review.add_argument("out", metavar="OUT", help="folder of the build")
    review.add_argument("--reviewer", metavar="NAME", help="who judges (default: the page asks)")
    review.add_argument("--port", type=int, default=8890, metavar="N")
    review.add_argument("--per-stratum", type=_count, default=20, metavar="N", help="samples of each task and fate (default: 20)")
    review.add_argument("--order", choices=("random", "doubt"), default="random", help="doubt: the doubtful first")
    review.add_argument("--seed", type=int, default=0, metavar="N")
    review.add_argument("--no-browser", action="store_true", help="print the address only")
    review.add_argument("--agreement", action="store_true", help="print how far reviewers agree, and do nothing else")
    report = _verb(parts, shared, "report", runs["reasoning report"], "quality and bias of what was built, as a page")
    report.add_argument("out", metavar="OUT", help="folder of the build")
    report.add_argument("--to", metavar="DIR", help="folder of the page (default: OUT/quality)")
    push = _verb(parts, shared, "push", runs["reasoning push"], "upload the data set to the hub, with its card")
    push.add_argument("out", metavar="OUT", help="folder of the build")
    push.add_argument("--repo", required=True, metavar="NAME", help="OWNER/NAME on the hub")
    push.add_argument("--private", action="store_true")
    push.add_argument("--dry-run", action="store_true", help="check and list the files; upload nothing")
    teacher = _verb(parts, shared, "teacher", runs["reasoning teacher"], "serve a scripted teacher that knows a folder's truth")
    teacher.add_argument("--data", required=True, metavar="DIR", help="MiniBEIR, or any folder in M-BEIR's layout")
    teacher.add_argument("--host", default="127.0.0.1", metavar="H")
    teacher.add_argument("--port", type=int, default=8891, metavar="N")
    teacher.add_argument("--model", default="scripted-oracle", metavar="NAME", help="name it serves (default: scripted-oracle)")
    teacher.add_argument("--key", metavar="KEY", help="ask for this key (default: none)")
    teacher.add_argument("--faults", type=float, default=0.0, metavar="SHARE", help="share of replies with a fault (default: 0)")
    teacher.add_argument("--latency", type=float, default=0.0, metavar="S", help="seconds before a reply (default: 0)")
    teacher.add_argument("--stall", type=float, default=5.0, metavar="S", help="seconds a stalled request hangs (default: 5)")
    teacher.add_argument("--log", metavar="FILE.jsonl", help="write every request here")
    teacher.add_argument("--seed", type=int, default=0, metavar="N", help="of the faults")


def _add_reasoning_build(parts: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    build = _verb(parts, shared, "build", runs["reasoning build"], "assess, reason, filter, verify; the same command resumes")
    build.add_argument("--data", required=True, metavar="DIR", help="folder in M-BEIR's layout")
    build.add_argument("--out", required=True, metavar="OUT", help="folder of the build")
    build.add_argument("--teacher", metavar="URL", help="OpenAI-compatible base URL, recorded:FILE.jsonl or batch:FOLDER")
    build.add_argument("--model", metavar="NAME", help="model the teacher serves")
    build.add_argument("--verifier", metavar="URL", help="another address for the verifier (default: the teacher's)")
    build.add_argument("--verifier-model", metavar="NAME", help="another model for the verifier (default: the teacher's)")
    build.add_argument(
        "--key-variable",
        default="OPENAI_API_KEY",
        metavar="VAR",
        help="variable that holds the key (default: OPENAI_API_KEY)",
    )
    build.add_argument("--tasks", metavar="A,B", help="tasks such as cirr_task7 (default: all)")
    build.add_argument("--direct", metavar="A,B", help="tasks that are direct unasked")
    build.add_argument("--complex", metavar="A,B", help="tasks that are complex unasked")
    build.add_argument("--captions", metavar="FILE.jsonl", help="picture captions for the rules: img_path, caption")
    build.add_argument("--templates", metavar="FILE.json", help="prompts of your own, by name")
    build.add_argument("--shard", default="0/1", metavar="i/N", help="do this share of the parts (default: 0/1)")
    build.add_argument("--engine", choices=("local", "ray"), default="local", help="ray: spread the parts over a Ray cluster")
    build.add_argument("--workers", type=_count, default=2, metavar="N", help="workers of the Ray engine (default: 2)")
    build.add_argument("--concurrency", type=_count, default=16, metavar="N", help="requests in flight (default: 16)")
    build.add_argument("--requests-per-minute", type=float, metavar="N")
    build.add_argument("--tokens-per-minute", type=float, metavar="N")
    build.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait for a reply (default: 120)")
    build.add_argument("--price-in", type=float, default=0.0, metavar="USD", help="for a million prompt tokens")
    build.add_argument("--price-out", type=float, default=0.0, metavar="USD", help="for a million tokens of replies")
    build.add_argument("--spend-limit", type=float, metavar="USD", help="stop before this is spent; needs the prices")
    build.add_argument(
        "--patience", type=int, default=24, metavar="N",
        help="stop after N replies to a stage of which none is of use; 0: go on (default: 24)",
    )  # fmt: skip
    build.add_argument("--journal", metavar="DIR", help="folder of answers, to share among builds (default: OUT/journal)")
    build.add_argument("--extra", metavar="JSON", help="an object that goes into every request body")
    build.add_argument("--dry-run", action="store_true", help="estimate requests, tokens and money; ask nothing")
    build.add_argument(
        "--complex-share", type=float, default=0.525, metavar="SHARE", help="for the estimate (default: the paper's 0.525)"
    )
    build.add_argument("--no-assemble", action="store_true", help="leave the data set for `reasoning assemble`")
    build.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="seed=1, attempts=3, verify_above=0.8, limits.reasoning_least=8; repeatable",
    )  # fmt: skip
    _add_assembly(build)


def _add_assembly(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=("parquet", "jsonl"), default="parquet", help="of the data set (default: parquet)")
    parser.add_argument(
        "--dropped", choices=("leave_out", "direct"), default="leave_out",
        help="dropped samples: left out (default), or taught as direct queries",
    )  # fmt: skip
    parser.add_argument("--no-negatives", action="store_true", help="leave out hard negatives")


def _add_train(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    train = _verb(verbs, shared, "train", runs["train"], "train a model; the same command again resumes")
    train.add_argument("--preset", required=True, choices=PRESETS)
    train.add_argument("--data", metavar="DIR", help="folder in M-BEIR's layout (default: the preset's)")
    train.add_argument("--out", metavar="DIR", help="folder of the run (default: the preset's)")
    train.add_argument("--init", metavar="MODEL", help="checkpoint to start from, or random (default: the preset's)")
    train.add_argument("--card", type=int, choices=(24, 80), help="fit the chunks to one card of so many GiB (LoRA presets)")
    train.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="override a field: steps=500, size.hidden=128, weights.cirr_task7=4; repeatable",
    )  # fmt: skip
    train.add_argument("--resume-from", type=Path, metavar="STEPDIR", help="start at another run's steps/NNNNNN")


def _add_ablate(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    ablate = _verb(
        verbs, shared, "ablate", runs["ablate"], "test the paper's claims in miniature; the same command again resumes"
    )
    ablate.add_argument("tables", nargs="?", default="all", metavar="TABLE[,TABLE]", help="table4, share, ... (default: all)")
    ablate.add_argument("--out", metavar="DIR", help="folder of the runs; the same one twice shares the work")
    ablate.add_argument("--data", metavar="DIR", help="folder in M-BEIR's layout (default: the preset's)")
    ablate.add_argument("--seeds", default="0,1,2", metavar="N,N", help="seeds of every variant (default: 0,1,2)")
    ablate.add_argument("--jobs", type=_count, default=1, metavar="N", help="processes that work side by side (default: 1)")
    ablate.add_argument("--report", metavar="DIR", help="write pages, plots and runs.json here")
    ablate.add_argument("--report-only", action="store_true", help="run nothing; report what is there")
    ablate.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="settings",
        help="override a field of the base configuration; repeatable",
    )  # fmt: skip
    ablate.add_argument("--list", action="store_true", help="name the tables and their runs, and do nothing")


def _add_merge(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    merge = _verb(verbs, shared, "merge", runs["merge"], "make an adapter and its base one plain checkpoint")
    merge.add_argument("adapter", metavar="ADAPTER", help="adapter folder, such as RUN/checkpoint, or hub id")
    merge.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder of the checkpoint; must not exist yet")
    merge.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="stored weights (default: float32; bfloat16 rounds)"
    )


def _add_push(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    push = _verb(verbs, shared, "push", runs["push"], "upload a checkpoint or adapter to the hub, with a model card")
    push.add_argument("folder", type=Path, metavar="FOLDER", help="what training, `traceir merge` or both have made")
    push.add_argument("--repo", required=True, metavar="NAME", help="OWNER/NAME on the hub, made if it is not there")
    push.add_argument("--run", type=Path, metavar="RUN", help="folder of the training, for the card")
    push.add_argument(
        "--evaluation", action="append", default=[], type=Path, metavar="DIR",
        help="what `traceir evaluate --out` wrote for this very folder, for the card; repeatable",
    )  # fmt: skip
    push.add_argument("--licence", metavar="ID", help="the hub's word for it, such as apache-2.0")
    push.add_argument("--revision", metavar="BRANCH", help="branch to upload to (default: main)")
    push.add_argument("--private", action="store_true", help="only you can see it; refused where a public one exists")
    push.add_argument("--dry-run", action="store_true", help="write the card, check and list the files; upload nothing")


def _add_demo(verbs: Any, shared: argparse.ArgumentParser, runs: Mapping[str, Run]) -> None:
    demo = _verb(verbs, shared, "demo", runs["demo"], "search a small gallery in every way, and write a contact sheet")
    demo.add_argument("--out", type=Path, default=Path("out/demo"), metavar="DIR", help="working folder (default: out/demo)")
    demo.add_argument(
        "--serve", choices=("no", "yes", "terminal"), default="no",
        help="then serve the gallery with its page; terminal: only where somebody sits at one (default: no)",
    )  # fmt: skip
    _add_model(demo)


def _verb(parts: Any, shared: argparse.ArgumentParser, name: str, run: Run, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parts.add_parser(name, help=help, description=help, parents=[shared])
    parser.set_defaults(verb=run)
    return parser


def _add_query(parser: argparse.ArgumentParser, words: str) -> None:
    parser.add_argument("words", nargs="*", metavar="TEXT", help=words)
    parser.add_argument("--text", metavar="T", help="the same as an option, for instance where it begins with a dash")
    parser.add_argument("--image", metavar="FILE", help="a picture to search with")
    parser.add_argument("--instruction", metavar="I", help="what kind of thing is wanted, in words")
    parser.add_argument(
        "--modality", choices=MODALITIES, metavar="image|text|image,text", help="the modality looked for (default: any)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="M",
        help=f"checkpoint folder or hub id, with st: before it for sentence-transformers (default: ${MODEL_VARIABLE}, else the "
        "bundled one)",
    )  # fmt: skip
    parser.add_argument("--dim", type=_count, metavar="N", help="keep the first N components, if the model is made for that")
    parser.add_argument("--profile", metavar="NAME|FILE.json", help="how another project's checkpoint is prompted and read")
    parser.add_argument("--device", default="cpu", metavar="D", help="torch device, for instance cuda (default: cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the weights (default: float32)")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", metavar="[FORM:]URL",
        help="SGLang server that runs the model, or FORM:URL of any /v1/embeddings that has one named M: vllm, infinity, openai, "
        f"... (docs/engines.md); its key in ${ENGINE_KEY_VARIABLE}",
    )  # fmt: skip


def _count(text: str) -> int:
    """An integer of at least 1, for argparse."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number
