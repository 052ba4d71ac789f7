"""Makes a finished `runs/mini.sh` the bundled model, and writes every result of it that the docs show.

`python -m benchmarks.bundle` copies out/runs/mini/checkpoint to models/mini with a meta.json that tells how it was made, then
scores it, and the two baselines that are there (`mini-direct`, same updates; `mini-direct-long`, same wall time), and writes
docs/results/: minibeir, routing, routes, steps, scoreboard, unseen, faithful, and a page of examples. What is encoded already
is not encoded again. `--before FOLDER`, an evaluation of the model bundled before, adds retrained.md: won and lost, query by
query. `--reranker ADAPTER` does none of this: it makes an adapter of `traceir train --preset mini-rerank` the model's reranker.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

from benchmarks.background import write_background
from traceir.adapter import Base, adapter_fingerprint, read_base, weights_fingerprint
from traceir.checkpoint import ADAPTER, ADAPTER_WEIGHTS, bundled_model, read_object
from traceir.encoder import Encoder
from traceir.evaluation.compare import compare
from traceir.evaluation.evaluate import evaluate
from traceir.evaluation.results import table
from traceir.evaluation.unseen.run import evaluate_unseen
from traceir.evaluation.unseen.run import table as unseen_table
from traceir.files import replacing_folder
from traceir.items import Route
from traceir.lab.examples import write_examples
from traceir.lab.faithful import probe
from traceir.lab.report import run_report
from traceir.lab.scoreboard import write_scoreboard
from traceir.minibeir.drawing import SIZE
from traceir.minibeir.unseen.build import build_unseen
from traceir.settings import read_settings, write_settings
from traceir.world import World, words_of

RUNS, OUT, RESULTS = Path("out/runs"), Path("out/evaluate"), Path("docs/results")
DATA, UNSEEN, MODEL = Path("data/minibeir"), Path("data/minibeir-unseen"), bundled_model()
STAGES = ("mini-naming", "mini-words", "mini-lessons", "mini")
BASELINES = {"mini-direct": "no reasoning, same updates", "mini-direct-long": "no reasoning, same wall time"}
ROUTES: tuple[Route, ...] = ("auto", "direct", "reason")
SAYS: Final = (
    "The bundled model is a miniature that knows one drawn world: three objects side by side on a table (ball, cone, cube, mug, "
    "ring or star, each in one colour), garments, and invented persons and towns. It wants whole sentences, such as: On the left "
    "a white ring, in the middle a blue ring, on the right a purple ring. A word or two, or real photos, give hits that mean "
    "nothing, whatever their scores."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="FOLDER", help="evaluation of the model bundled before")
    parser.add_argument("--reranker", type=Path, metavar="ADAPTER", help="make it the bundled model's reranker, and end")
    options = parser.parse_args()
    before = options.before
    torch.set_num_threads(1)
    if options.reranker is not None:
        bundle_reranker(options.reranker)
        return
    bundle(RUNS / "mini" / "checkpoint")
    encoder = Encoder.from_pretrained(MODEL)
    scores = OUT / encoder.fingerprint
    results = evaluate(encoder, DATA, scores, routes=ROUTES, pools=("local", "global"))
    assert results is not None
    (MODEL / "meta.json").write_text(json.dumps(describe(results), indent=1) + "\n")
    write_scores(results, encoder.fingerprint)
    if before is not None:
        for depth, name in ((None, "retrained.md"), (1, "retrained-at-1.md")):
            compare(f"before={before}:auto", f"now={scores}:auto", k=depth, out=RESULTS / name)
    run_report("routing", [scores], RESULTS / "routing.md")
    run_report("routes", [scores], RESULTS / "routes.md")
    compared = [f"ours={scores}:auto", f"ours, bypassed={scores}:direct"]
    for name, label in BASELINES.items():
        if (RUNS / name / "checkpoint" / "traceir.json").is_file():
            baseline = Encoder.from_pretrained(RUNS / name / "checkpoint")
            evaluate(baseline, DATA, OUT / baseline.fingerprint, routes=("direct",))
            compared.insert(0, f"{label}={OUT / baseline.fingerprint}:direct")
    run_report("steps", compared, RESULTS / "steps.md")
    write_scoreboard([*compared, f"ours, always reasoning={scores}:reason"], RESULTS / "scoreboard.md")
    write_examples(scores, DATA, RESULTS / "examples")
    probe(encoder, DATA, OUT / "faithful")
    shutil.copyfile(OUT / "faithful" / "faithful.md", RESULTS / "faithful.md")
    write_unseen(encoder)


def bundle(checkpoint: Path) -> None:
    """The checkpoint's files in place of the bundled ones."""
    if not (checkpoint / "traceir.json").is_file():
        raise SystemExit(f"{checkpoint} is not there; run runs/mini.sh first")
    MODEL.mkdir(parents=True, exist_ok=True)
    for file in MODEL.iterdir():  # a reranker too, which belongs to the weights that were there
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    for file in checkpoint.iterdir():
        shutil.copyfile(file, MODEL / file.name)
    settings = MODEL / "traceir.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"world": world().as_json()}, indent=2) + "\n")
    write_background(MODEL)


def bundle_reranker(checkpoint: Path) -> None:
    """The adapter's files below the bundled model, which is its base; tensors in float16."""
    target, base = MODEL / "rerank", Base(f"../../{MODEL.name}", weights_fingerprint(MODEL))
    if read_base(checkpoint).fingerprint != base.fingerprint:
        raise SystemExit(f"{checkpoint} is not an adapter over {MODEL}, whose weights are {base.fingerprint}")
    with replacing_folder(target) as fresh:
        for name in (ADAPTER, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(checkpoint / name, fresh / name)
        config = read_object(fresh / ADAPTER) | {"base_model_name_or_path": base.source}
        (fresh / ADAPTER).write_text(json.dumps(config, indent=2) + "\n")
        weights = load_file(checkpoint / ADAPTER_WEIGHTS)
        save_file({name: value.half() for name, value in weights.items()}, fresh / ADAPTER_WEIGHTS, {"format": "pt"})
        settings = read_settings(checkpoint / "traceir.json")
        assert settings is not None
        made = replace(settings, fingerprint=adapter_fingerprint(fresh, base.fingerprint))
        write_settings(made, fresh, base=asdict(base))
        (fresh / ADAPTER_WEIGHTS).chmod(0o644)
        meta = json.loads((checkpoint.parent / "meta.json").read_text())
        told = {name: meta[name] for name in ("data_fingerprint", "torch", "machine", "seconds_since_last_start")}
        config = {name: value for name, value in meta["config"].items() if name not in ("data", "out", "cache", "init")}
        about = {"format": 1, "command": "traceir train --preset mini-rerank", **told, "config": config}
        (fresh / "meta.json").write_text(json.dumps(about, indent=1) + "\n")


def world() -> World:
    """What the bundled model knows: the words of all queries, candidates and instructions, and the size of all images."""
    files = [*DATA.glob("query/*/*.jsonl"), *DATA.glob("cand_pool/*/*.jsonl")]
    texts = [json.loads(line).get(key) or "" for file in files for line in file.open() for key in ("query_txt", "txt")]
    instructions = (DATA / "instructions" / "query_instructions.tsv").read_text()
    return World(SAYS, words_of(" ".join([*texts, instructions])), (SIZE, SIZE))


def describe(results: dict[str, Any]) -> dict[str, Any]:
    """How the bundled model was made, stage by stage, and its scores."""
    metas = {name: json.loads((RUNS / name / "meta.json").read_text()) for name in STAGES}
    last = metas["mini"]
    rows = {
        route: {name: row[f"hit@{row['metric_k']}"] for name, row in scored.items()}
        for route, scored in results["routes"].items()
    }
    return {
        "format": 2,
        "command": "runs/mini.sh",
        "data": "MiniBEIR full, seed 0",
        "data_fingerprint": last["data_fingerprint"],
        "torch": last["torch"],
        "machine": last["machine"],
        "stages": {name: {"seconds": meta["seconds_since_last_start"], "config": meta["config"]} for name, meta in metas.items()},
        "results": {"average": results["average"], "rows": rows},
    }


def write_unseen(encoder: Encoder) -> None:
    """The 13 zero-shot columns in miniature, by every route."""
    if not (UNSEEN / "unseen.json").is_file():
        build_unseen(UNSEEN, scale="full", seed=0)
    results = evaluate_unseen(encoder, UNSEEN, OUT / "unseen" / encoder.fingerprint, routes=ROUTES)
    head = "# The bundled model on the 13 unseen columns in miniature\n\nNo query of these kinds is in its training data "
    head += "([minibeir.md](../minibeir.md)).\n\n"
    made = f"`python -m benchmarks.bundle`; model `{encoder.fingerprint}`, data `{results['data'][:16]}`, seed 0, "
    made += f"{results['machine']}."
    (RESULTS / "unseen.md").write_text(f"{head}{made}\n\n{unseen_table(results)}\n")


def write_scores(results: dict[str, Any], fingerprint: str) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    head = "# The bundled model on MiniBEIR full, test split\n\n"
    made = f"`python -m benchmarks.bundle`; model `{fingerprint}`, data `{results['data'][:16]}`, seed 0, {results['machine']}."
    (RESULTS / "minibeir.md").write_text(f"{head}{made}\n\n{table(results)}\n")


if __name__ == "__main__":
    main()
