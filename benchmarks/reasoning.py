"""What M-BEIR-CoT's pipeline claims, measured through the real HTTP path (`python -m benchmarks.reasoning PART`).

faults  a folder through a scripted teacher that spoils a tenth of its replies: every kind of fault, injected, caught, missed, and
        what was dropped without a fault. Ends with status 1 where a share is above `--at-most`.
kills   the same build, ended by SIGKILL at random moments: final data and stage files must have the same bytes as those of an
        uninterrupted build, and the teacher's own log must show no answer paid twice but those in flight at a kill.
scale   synthetic samples through all stages and assembly in one process: samples a second of filter and assembly, peak memory.
folder  a dry run and a full build of any folder, and its stage files read by `datasets`.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image

from traceir.cot.ask import TeacherQuestion, blocks
from traceir.cot.build import Work, run_parts
from traceir.cot.outcomes import CotOutcome, read_outcomes
from traceir.cot.plan import DATASET, STAGES, BuildConfig, begin
from traceir.cot.products import assemble
from traceir.cot.rules import RuleFilter
from traceir.cot.scripted.oracle import ALL, CONTENT, MEANT, TRANSPORT
from traceir.cot.scripted.teacher_server import MODEL, running
from traceir.cot.source import CaseSource, find_parts
from traceir.cot.teachers.answer_cache import FILE
from traceir.cot.teachers.teacher import Reply
from traceir.data import mbeir
from traceir.errors import TeacherError

SETTINGS = ("attempts=1", "limits.reasoning_least=8")
"""MiniBEIR's labels are terse: ten tokens are a whole reasoning there. A fault of the scripted teacher comes back when it is
asked again, so it is asked once."""
SPOILT_SHARE = 0.10
SENT_S = 1.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True)
    for name, run in (("faults", faults), ("kills", kills), ("scale", scale), ("folder", folder)):
        part = parts.add_parser(name)
        part.set_defaults(run=run)
        part.add_argument("--out", type=Path, default=Path("out/reasoning") / name)
        part.add_argument("--seed", type=int, default=0)
        if name != "scale":
            part.add_argument("--data", type=Path, default=Path("data/minibeir"))
            part.add_argument("--concurrency", type=int, default=64)
        if name in ("faults", "kills"):
            part.add_argument("--rate", type=float, default=SPOILT_SHARE)
            part.add_argument("--fault-seed", type=int, default=0, help="of the faults; --seed draws the moments of the kills")
        if name == "faults":
            part.add_argument("--at-most", type=float, default=0.02, help="share of misses, and of wrong drops (default: 0.02)")
            part.add_argument("--report", type=Path, help="write the table here too")
        if name == "kills":
            part.add_argument("--kills", type=int, default=50)
            part.add_argument("--against", type=Path, help="an uninterrupted build of the same data (default: made first)")
            part.add_argument("--latency", type=float, default=0.02, help="seconds of the teacher (default: 0.02)")
        if name == "scale":
            part.add_argument("--samples", type=int, default=100_000)
            part.add_argument("--most-gib", type=float, default=1.0)
    options = parser.parse_args()
    return int(options.run(options))


# faults


def faults(options: argparse.Namespace) -> int:
    """Builds with faults (once; the same folder again is only counted) and prints the table."""
    out, log = options.out, options.out / "teacher.jsonl"
    captions = write_captions(options.data, out)
    started = time.monotonic()
    with running(options.data, faults=options.rate, fault_seed=options.fault_seed, log=str(log), stall=0.2) as url:
        build(options.data, out, url, captions, options.concurrency)
    seconds = time.monotonic() - started
    injected = injected_faults(log)
    text, worst = fault_table(read_outcomes(out), injected)
    chosen = f"rate {options.rate:g}, seed {options.fault_seed}"
    about = f"data {options.data}, {chosen}, {options.concurrency} in flight, {seconds:.0f} s"
    print(text := f"{text}\n\n{about}")
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(text + "\n", encoding="utf-8")
    if worst > options.at_most:
        print(f"a share is {worst:.2%}, above {options.at_most:.2%}", file=sys.stderr)
        return 1
    return 0


def write_captions(data: Path, out: Path) -> Path:
    """What the images of MiniBEIR's composed queries show, by its own labels: `see SOURCE; ...` and the answer."""
    out.mkdir(parents=True, exist_ok=True)
    captions: dict[str, str] = {}
    images = {candidate.did: candidate.image_path for candidate in mbeir.read_pool(mbeir.train_pool_path(data))}
    for dataset in mbeir.train_datasets(data):
        labels = mbeir.read_labels(mbeir.train_labels_path(data, dataset))
        for record in mbeir.read_train(data, dataset):
            label = labels.get(record.qid)
            if record.task_id == 7 and label and label.reasoning and label.answer:
                captions.setdefault(str(record.image_path), label.reasoning.partition(";")[0].removeprefix("see "))
                for did in record.positives:
                    if path := images.get(did):
                        captions.setdefault(path, label.answer)
    file = out / "world-captions.jsonl"
    lines = (json.dumps({"img_path": path, "caption": text}) for path, text in sorted(captions.items()))
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def command(data: Path, out: Path, url: str, captions: Path | None, concurrency: int) -> list[str]:
    """The build as a user would type it."""
    arguments = [sys.executable, "-m", "traceir", "reasoning", "build", "--data", str(data), "--out", str(out), "--teacher", url]
    arguments += ["--model", MODEL, "--concurrency", str(concurrency), "--timeout", "20"]
    arguments += ["--captions", str(captions)] if captions else []
    for setting in SETTINGS:
        arguments += ["--set", setting]
    return arguments


def build(data: Path, out: Path, url: str, captions: Path | None, concurrency: int) -> None:
    subprocess.run(command(data, out, url, captions, concurrency), check=True)


def injected_faults(log: Path) -> dict[tuple[str, str], str]:
    """(qid, stage) -> the fault of content that the teacher's log says its question met."""
    faults: dict[tuple[str, str], str] = {}
    for line in ledger(log):
        if line["event"] == "end" and line["fault"]:
            for qid in line["qids"]:
                if line["fault"] not in TRANSPORT or (qid, line["stage"]) not in faults:
                    faults[qid, line["stage"]] = line["fault"]
    return faults


def ledger(log: Path) -> Iterator[dict[str, Any]]:
    with log.open(encoding="utf-8") as stream:
        for line in stream:
            try:
                yield json.loads(line)
            except ValueError:
                continue  # half a line, of a server that was killed


def fault_table(outcomes: Iterator[CotOutcome], injected: dict[tuple[str, str], str]) -> tuple[str, float]:
    """The table, and the worst of: share missed of any kind, share dropped of the samples without a fault."""
    met, meant, other, missed = Counter[str](), Counter[str](), Counter[str](), Counter[str]()
    clean, wrong, repeated = 0, Counter[str](), 0
    for outcome in outcomes:
        kinds = [injected.get((outcome.case.record.qid, stage)) for stage in ("assess", "reason", "verify")]
        for kind in filter(None, kinds):
            met[kind] += 1
        kind = next((kind for kind in kinds if kind and kind not in TRANSPORT), None)
        if kind is None:
            clean += 1
            if outcome.rule == "duplicate":
                repeated += 1
            elif outcome.status == "dropped":
                wrong[outcome.rule] += 1
            continue
        if outcome.status == "dropped":
            (meant if outcome.rule == MEANT[kind] else other)[kind] += 1
        else:
            missed[kind] += 1
    lines = ["| fault | meant for | injected | caught by it | by another | missed |", "|---|---|---|---|---|---|"]
    worst = sum(wrong.values()) / max(1, clean)
    for kind in ALL:
        if kind in TRANSPORT:
            lines.append(f"| {kind} | retry | {met[kind]} | | | 0 |")
            continue
        share = missed[kind] / max(1, met[kind])
        worst = max(worst, share)
        lines.append(f"| {kind} | {MEANT[kind]} | {met[kind]} | {meant[kind]} | {other[kind]} | {missed[kind]} ({share:.1%}) |")
    counts = ", ".join(f"{rule} {count}" for rule, count in wrong.most_common()) or "none"
    lines += ["", f"samples without a fault of content: {clean}; wrongly dropped: {sum(wrong.values())} ({counts}), "
              f"{sum(wrong.values()) / max(1, clean):.3%}; repetitions of an earlier sample, rightly dropped: {repeated}; "
              f"all misses: {sum(missed.values())} of {sum(met[kind] for kind in (*CONTENT, 'bad_json'))}"]  # fmt: skip
    return "\n".join(lines), worst


# kills


def kills(options: argparse.Namespace) -> int:
    """Kills the build at random moments, evenly spread over its answers, and compares what is left with an uninterrupted one."""
    out, whole = options.out / "killed", options.against or options.out / "whole"
    chosen = {"faults": options.rate, "fault_seed": options.fault_seed, "stall": 0.2}
    captions = write_captions(options.data, options.out) if not options.against else options.against / "world-captions.jsonl"
    if not options.against:
        with running(options.data, **chosen, log=str(whole / "teacher.jsonl")) as url:
            build(options.data, whole, url, captions, options.concurrency)
    total = (whole / "journal" / FILE).stat().st_size
    draw = random.Random(options.seed)
    moments = sorted(draw.uniform(0.0, 1.0) * total for _ in range(options.kills))
    shutil.rmtree(out, ignore_errors=True)
    log, killed = out / "teacher.jsonl", []
    with running(options.data, **chosen, log=str(log), latency=options.latency) as url:
        arguments = command(options.data, out, url, captions, options.concurrency)
        for moment in moments:
            if (when := kill_at(arguments, out / "journal", moment, draw.uniform(0.0, 0.5))) is not None:
                killed.append(when)
        subprocess.run(arguments, check=True)
    different = differences(whole, out)
    twice, unexplained, lag = paid_twice(log, out / "journal", killed)
    print(f"killed {len(killed)} times by SIGKILL; files that differ from the uninterrupted build: {different or 'none'}")
    print(
        f"answers paid twice: {twice}, all of them in flight at a kill: {unexplained == 0} (at most {lag:.3f} s after their end)"
    )
    return 0 if not different and not unexplained and len(killed) == options.kills else 1


def kill_at(arguments: list[str], journal: Path, moment: float, delay: float) -> float | None:
    """Starts the build and kills it once its answers have `moment` bytes; the time, or None where it ended before."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None:
        if (journal / FILE).exists() and (journal / FILE).stat().st_size >= moment:
            time.sleep(delay)
            break
        time.sleep(0.02)
    if process.poll() is not None:
        return None
    os.killpg(process.pid, signal.SIGKILL)
    when = time.time()
    process.wait()
    return when


def differences(first: Path, second: Path) -> list[str]:
    """Files of the data set and of the stages whose bytes differ; cards, and the folder that a manifest names, do not count."""
    different = []
    for name in (DATASET, *STAGES):
        for file in sorted((first / name).iterdir()):
            if file.is_file() and file.name != "README.md" and digest(file) != digest(second / name / file.name):
                different.append(f"{name}/{file.name}")
    return different


def digest(file: Path) -> str:
    if not file.exists():
        return "missing"
    content = file.read_bytes()
    if file.name == "manifest.json":
        content = json.dumps(json.loads(content) | {"root": ""}).encode()
    return hashlib.sha256(content).hexdigest()


def paid_twice(log: Path, journal: Path, killed: list[float]) -> tuple[int, int, float]:
    """Answers that were paid more than once, how many of them no kill explains, and the longest time from end to kill.

    A kill explains it if the first request was sent before it and the next one after. The server may read a request up to
    SENT_S after it was sent; a build that is started again takes longer than that to its first request.
    """
    begun: dict[int, float] = {}
    paid: dict[str, list[tuple[float, float]]] = {}
    for line in ledger(log):
        if line["event"] == "start":
            begun[line["request"]] = line["time"]
        elif line["paid"]:
            paid.setdefault(line["key"], []).append((begun[line["request"]], line["time"]))
    repeated = {key: sorted(times) for key, times in paid.items() if len(times) > 1}
    unexplained, lag = 0, 0.0
    for times in repeated.values():
        for (start, end), (again, _) in pairwise(times):
            between = [when for when in killed if start - SENT_S <= when <= again]
            if not between:
                unexplained += 1
            else:
                lag = max(lag, between[0] - end)
    return sum(len(times) - 1 for times in repeated.values()), unexplained, lag


# scale


class Scripted:
    """Answers in this process, at once, without a cache: what is measured is the pipeline."""

    async def ask(self, question: TeacherQuestion) -> Reply:
        await asyncio.sleep(0)
        text = blocks("".join(part for part in question.parts if isinstance(part, str)))
        if question.stage == "assess":
            reply = '{"complex": true, "reason": "a change is asked for", "confidence": 0.9}'
        elif question.stage == "verify":
            reply = '{"verdict": "yes", "confidence": 0.9, "reason": "it fits"}'
        else:
            reply = (
                f"<reasoning>The picture shows a plain object on a table. The change asks for this: {text['query']}. All else "
                f"stays the same as before.</reasoning><answer>the object after this: {text['query']}</answer>"
            )
        return Reply(reply, "stop", "scripted", 400, 60)

    def stop(self, error: TeacherError, worthless: Iterable[str] = ()) -> None:
        return

    def status(self) -> str:
        return ""

    async def close(self) -> None:
        return


def scale(options: argparse.Namespace) -> int:
    """All stages and assembly over synthetic samples; peak memory is that of this process."""
    shutil.rmtree(options.out, ignore_errors=True)
    data, out = options.out / "data", options.out / "build"
    write_synthetic(data, options.samples, random.Random(options.seed))
    config = BuildConfig(str(data), "scripted", attempts=1)
    begin(out, config)
    source, asker = CaseSource(data), Scripted()
    started = time.monotonic()
    rules = RuleFilter(config.limits)
    run_parts(Work(config, out, source, config.questions(), rules, asker, asker), find_parts(data, config.part_size))
    built = time.monotonic()
    source.close()
    checked = 0
    for outcome in read_outcomes(out):
        checked += 1
        rules.check(outcome.case, outcome.raw)
    filtered = time.monotonic()
    funnel = assemble(out)
    ended = time.monotonic()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{options.samples} samples: all stages {options.samples / (built - started):.0f} a second, rules alone with reading "
        f"{checked / (filtered - built):.0f}, assembly {options.samples / (ended - filtered):.0f}; "
        f"kept {funnel.as_json()['all'].get('kept', 0)}; peak memory {peak:.2f} GiB; seed {options.seed}"
    )
    return 0 if peak < options.most_gib and checked == options.samples else 1


def write_synthetic(data: Path, samples: int, draw: random.Random) -> None:
    """A folder in M-BEIR's layout with one task of composed queries, all different, over one image."""
    for name in ("query/train", "cand_pool/global", "instructions", "mbeir_images"):
        (data / name).mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 32), "navy").save(data / "mbeir_images" / "one.png")
    words = ["red", "green", "small", "large", "round", "wooden", "bright", "striped", "glass", "old", "new", "folded"]
    with (
        (data / "query/train/mbeir_cirr_train.jsonl").open("w") as queries,
        (data / "cand_pool/global/mbeir_union_train_cand_pool.jsonl").open("w") as pool,
    ):
        for number in range(1, samples + 1):
            text = f"make it {' and '.join(draw.sample(words, 3))} like number {number}"
            line = {
                "qid": f"8:{number}", "query_txt": text, "query_img_path": "mbeir_images/one.png", "query_modality": "image,text",
                "pos_cand_list": [f"8:{number}"], "neg_cand_list": [], "task_id": 7,
            }  # fmt: skip
            queries.write(json.dumps(line) + "\n")
            image = {"did": f"8:{number}", "txt": None, "img_path": "mbeir_images/one.png", "modality": "image"}
            pool.write(json.dumps(image) + "\n")
    header = "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\n"
    text = "image,text\timage\tCIRR\t8\tFind the picture after the change.\n"
    (data / "instructions/query_instructions.tsv").write_text(header + text)


# folder


def folder(options: argparse.Namespace) -> int:
    """A dry run, a full build through HTTP, and every stage read back by `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    out = options.out
    dry = [*command(options.data, out, "http://127.0.0.1:9/v1", None, 1), "--dry-run", "--price-in", "2.5", "--price-out", "10"]
    subprocess.run(dry, check=True)
    with running(options.data, log=str(out / "teacher.jsonl")) as url:
        build(options.data, out, url, None, options.concurrency)
    for stage in STAGES:
        files = [str(file) for file in sorted((out / stage).glob("*.jsonl"))]
        read = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(out / "cache"))
        print(f"{stage}: {len(read)} rows in {len(files)} files, columns {', '.join(read.column_names)}")
    read = datasets.load_dataset(str(out / DATASET), split="train", cache_dir=str(out / "cache"))
    print(f"{DATASET}: {len(read)} rows, {sum(read['z'])} with reasoning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
