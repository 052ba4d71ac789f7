"""Reports, files and whole commands of both sides of a swap, for `benchmarks.swaps`; swaps_process.py says who calls them."""

from __future__ import annotations

import asyncio
import hashlib
import json
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.swaps_process import Asks, Settings, Spent, cpu_of_itself, warmed


def lab(role: str, settings: Settings) -> Asks:
    """Whole reports over two finished evaluations of 18 rows; their texts come out."""
    folders = [evaluated(Path(settings["scratch"]) / f"evaluation-{name}", seed) for seed, name in enumerate("ab")]
    package = "traceir.learn" if role == "before" else "traceir.lab"
    run_report, board = import_module(f"{package}.report").run_report, import_module(f"{package}.scoreboard").write_scoreboard
    out = Path(settings["scratch"]) / f"reports-{role}"
    out.mkdir()
    return warmed(
        {
            "by steps": lambda: run_report("steps", folders, out / "steps.md") and None,
            "routing": lambda: run_report("routing", folders) and None,
            "scoreboard": lambda: board(folders, out / "scoreboard.md") and None,
        }
    )


def evaluated(folder: Path, seed: int) -> Path:
    """What `traceir evaluate` leaves, as far as reports read it; made once."""
    if folder.exists():
        return folder
    folder.mkdir()
    draw = np.random.default_rng([5, seed])
    rows: dict[str, Any] = {}
    with (folder / "queries-auto.jsonl").open("w", encoding="utf-8") as stream:
        for row in range(18):
            name = f"cirr_task{row}"
            rows[name] = {"queries": 200, "metric_k": 5, "queries_per_second": 10.0}
            for number in range(200):
                steps, text = number % 5, "first this, then that" if number % 5 > 1 else ""
                line = {"row": name, "qid": f"{row}:{number}", "rank": int(draw.geometric(0.3)), "tokens": len(text.split()),
                        "route": "reason" if text else "direct", "truncated": False, "emb_probability": 0.5, "steps": steps,
                        "exact": bool(draw.integers(2)) if text else None, "answer_exact": None, "reasoning": text}  # fmt: skip
                stream.write(json.dumps(line) + "\n")
    about = {"format": 2, "model": f"model-{seed}", "data": "data", "split": "test", "limit": None, "threshold": None}
    (folder / "results.json").write_text(json.dumps({**about, "routes": {"auto": rows}}), encoding="utf-8")
    return folder


def quality(role: str, settings: Settings) -> Asks:
    """The figures of so many outcomes of a build, half of them kept; made before the clock starts."""
    package = "traceir.learn.reasoning" if role == "before" else "traceir.cot"
    measure = import_module(f"{package}.quality.quality").measure
    sizes = [int(part) for part in settings["samples"].split(",")]
    outcomes = [outcome(role, number) for number in range(max(sizes))]
    measure(outcomes[:500])

    def measured(size: int) -> list[Any]:
        return funnel(measure(outcomes[:size]))

    return {f"{size:,} samples": partial(measured, size) for size in sizes}


def funnel(quality: Any) -> list[Any]:
    """Those figures that do not hang on a sample, or on how a quantile is taken."""
    figures = asdict(quality.overall)
    return [figures["funnel"], figures["rules"], figures["kept_share"]]


def outcome(role: str, number: int) -> Any:
    """One outcome, of words that repeat as words of a language do."""
    old = role == "before"
    ask, mbeir, outcomes = (
        import_module(f"traceir.{name}")
        for name in (
            ("learn.reasoning.ask", "learn.mbeir", "learn.reasoning.outcomes")
            if old
            else ("cot.ask", "data.mbeir", "cot.outcomes")
        )
    )
    draw = np.random.default_rng([6, number])
    words = [f"word{rank}" for rank in np.minimum(draw.zipf(1.3, 60), 20_000)]
    reasoning, kept = " ".join(words), number % 2 == 0
    record = mbeir.Record(str(number), "make it red", "a.png", "image,text", (str(number),), (), 7)
    positive = mbeir.Candidate(str(number), " ".join(words[20:35]), None, "text")
    case = (ask.Case if old else ask.CotCase)(record, f"task{number % 8}", "Find it.", (positive,), Path())
    provenance = {"teacher": "t", "prompts": "cot-1", "prompt_tokens": 100, "completion_tokens": 10}
    return (outcomes.Outcome if old else outcomes.CotOutcome)(
        case=case, z=1, assessment="", confidence=1.0, reasoning=reasoning, answer=" ".join(words[:6]), raw=reasoning,
        status="kept" if kept else "dropped", rule="" if kept else "verifier", detail="", verdict=kept,
        verdict_confidence=0.9, verdict_reason="", provenance=json.dumps(provenance),
    )  # fmt: skip


def annotations(role: str, settings: Settings) -> Asks:
    """All annotation files of the 13 sets, small as the tests have them, read ten times."""
    root = Path(settings["scratch"]) / "unseen"
    if not root.exists():
        with zipfile.ZipFile(settings["unseen"]) as packed:
            packed.extractall(root)
    where = "traceir.learn.unseen.catalogue" if role == "before" else "traceir.evaluation.unseen.run"
    module = import_module(where)

    def read() -> list[int]:
        return [len(task.cases) for _ in range(10) for task in module.read_columns(root, module.find_columns(root))]

    return warmed({"reading them": read})


def answers(role: str, settings: Settings) -> Asks:
    """Answers that 64 askers look up, miss and keep, as a build does; then the folder opened anew and all looked up."""
    count, folder = settings["answers"], Path(settings["scratch"]) / f"answers-{role}"
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(count)]
    text = " ".join(f"word{number}" for number in range(100))

    def keep() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        (old_answers if role == "before" else new_answers)(folder, keys, text, looked_up=False)

    def look() -> None:
        (old_answers if role == "before" else new_answers)(folder, keys, text, looked_up=True)

    return warmed({f"{count:,} kept": keep, "found again": look})


def old_answers(folder: Path, keys: list[str], text: str, looked_up: bool) -> None:
    completion, journal = (import_module(f"traceir.learn.reasoning.teachers.{name}") for name in ("completion", "journal"))
    with journal.Journal(folder) as kept:
        for key in keys:
            if (kept.get(key) is not None) != looked_up:
                raise SystemExit(f"{folder}: the answer to {key} is not as expected")
            if not looked_up:
                kept.add(key, "reason", "1:1", completion.Reply(text, "stop", "model", 100, 100, key=key))


def new_answers(folder: Path, keys: list[str], text: str, looked_up: bool) -> None:
    cache, teacher = (import_module(f"traceir.cot.teachers.{name}") for name in ("answer_cache", "teacher"))

    async def ask(kept: Any, mine: list[str]) -> None:
        for key in mine:
            if (await asyncio.wrap_future(kept.get(key)) is not None) != looked_up:
                raise SystemExit(f"{folder}: the answer to {key} is not as expected")
            if not looked_up:
                reply = teacher.Reply(text, "stop", "model", 100, 100, key=key)
                await asyncio.wrap_future(kept.put("reason", "1:1", reply))

    async def ask_all() -> None:
        with cache.AnswerCache(folder, "one") as kept:
            await asyncio.gather(*(ask(kept, keys[start::64]) for start in range(64)))

    asyncio.run(ask_all())


def audit(role: str, settings: Settings) -> Asks:
    """20,000 lines of the audit log, through its queue, with rotations."""
    from traceir.serve.audit import AuditLog

    folder = Path(settings["scratch"]) / f"audit-{role}"
    folder.mkdir()
    line = {"request": "a" * 24, "path": "/search", "status": 200, "hmac": "b" * 64, "seconds": 0.01}

    def write() -> int:
        log = AuditLog(folder / "audit.log", most_bytes=1 << 20, keep=2, waiting=100_000)
        for _ in range(20_000):
            log.write(line)
        log.close(60)
        return log.dropped

    return warmed({"20,000 lines": write})


def train(role: str, settings: Settings) -> Asks:
    """The whole command from the bundled model, start included."""
    from traceir.checkpoint import bundled_model

    out = Path(settings["scratch"]) / f"run-{role}"

    def run() -> None:
        chosen = [part for setting in (f"steps={settings['steps']}", "store_pixels=false") for part in ("--set", setting)]
        given = ("--data", settings["data"], "--init", bundled_model(), "--out", out, *chosen)
        traceir("--threads", "1", "train", "--preset", "mini", *given)
        shutil.rmtree(out)

    return {f"{settings['steps']} steps of training": run}


def build(role: str, settings: Settings) -> Asks:
    """A build of M-BEIR-CoT of the small MiniBEIR with a scripted teacher, both of this side; start and reading included."""
    data, out = Path(settings["scratch"]) / "small", Path(settings["scratch"]) / f"build-{role}"
    if not data.exists():
        traceir("minibeir", "build", "--scale", "small", "--out", data)

    def built(of_teacher: bool) -> Spent:
        with scripted_teacher(data) as (address, process):
            begun, of_server = cpu_of_itself(), _of(process)
            traceir("reasoning", "build", "--data", data, "--out", out, "--teacher", address, "--model", "scripted-oracle")
            spent = Spent(_of(process) - of_server if of_teacher else cpu_of_itself() - begun)
        shutil.rmtree(out)
        return spent

    return {"a whole build": lambda: built(False), "its teacher": lambda: built(True)}


def traceir(*arguments: object) -> None:
    command = [sys.executable, "-m", "traceir", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")


@contextmanager
def scripted_teacher(data: Path) -> Iterator[tuple[str, psutil.Popen]]:
    """A teacher that answers; its address and its process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "traceir", "reasoning", "teacher", "--data", str(data), "--port", str(port)]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with socket.socket() as tried:
                if tried.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait()


def _of(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)
