"""One run at the true size of Qwen2.5-VL: random weights in the published shape and form, used as users do.

`python -m benchmarks.real_size --work DIR` makes the checkpoint there (configuration, names, shards and preprocessor_config as
published; Qwen's real vocabulary from the file `qwen.tiktoken` of PyPI's dashscope, which pip downloads), then loads it, embeds
images and texts, lets queries write and takes a LoRA step, each in a process of its own, so that peaks are apart. Random
weights say nothing about vectors, and all about memory, time and what breaks. What is done is kept in `DIR/SHAPE.json`: the same
command goes on, `--stage` runs some parts again, and `--report FILE` writes all as Markdown. Delete the folder afterwards.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.train_shapes import SHAPES, empty_network, machine, peak_mib
from traceir.data.settings import override
from traceir.encoder import Encoder
from traceir.items import Item, Query
from traceir.lab.mini_presets import PRESETS
from traceir.model import load
from traceir.train.train import train

SHARD_BYTES: Final = 2 * 10**9
# The added tokens of Qwen2.5-VL's tokenizer_config.json, in the order of their ids, which go on from the vocabulary's 151,643.
ADDED: Final = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
    "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>",
)  # fmt: skip
IDS: Final = {
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652, "vision_end_token_id": 151653,
    "vision_token_id": 151654, "image_token_id": 151655, "video_token_id": 151656,
}  # fmt: skip
# preprocessor_config.json of Qwen2.5-VL-3B-Instruct and -7B-Instruct.
PREPROCESSOR: Final = {
    "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
    "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor",
}  # fmt: skip
SIZES: Final = ((640, 480), (800, 600), (1024, 768), (1280, 720), (1280, 960), (1600, 1200), (600, 1800), (3000, 2000))
WORDS: Final = (20, 40, 80, 120, 160, 240, 320, 400)
"""Tokens of the texts, about; the words of SENTENCE are one token each."""
SENTENCE: Final = "the red house stands on a green hill near the old river and two small dogs run along the road"
CHUNK_TOKENS: Final = 2048
TOKENS: Final = 16
"""Most tokens of an image in the LoRA step, so that a few CPU cores are done with it in minutes."""
BATCH: Final = 8
WRITTEN: Final = 16


@dataclass(frozen=True, slots=True)
class Measured:
    """What one part took: seconds without starting Python and, but for `load`, without loading; peaks are of the whole process.

    `cpu` counts the seconds of all threads, which other work on the machine does not lengthen. `private_gib` leaves out pages of
    files that are only mapped, which the system may drop; looked at every 20 ms.
    """

    what: str
    seconds: float
    cpu: float
    loading: float
    peak_gib: float
    private_gib: float
    note: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", default="out/real-size", metavar="DIR", help="scratch folder (default: out/real-size)")
    parser.add_argument("--shape", choices=("3b", "7b"), default="3b")
    parser.add_argument("--stage", choices=STAGES, nargs="*", help="parts to run (default: all that are not done)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, metavar="N")
    parser.add_argument("--report", metavar="FILE", help="only write what DIR holds as Markdown")
    parser.add_argument("--here", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    work = Path(args.work)
    if args.report:
        Path(args.report).write_text(report(work))
        return 0
    if args.here:
        torch.set_num_threads(args.threads)
        print(json.dumps(asdict(STAGES[args.here](work, args.shape))))
        return 0
    work.mkdir(parents=True, exist_ok=True)
    make(work, args.shape)
    return run(work, args.shape, args.stage or list(STAGES), args.threads, again=bool(args.stage))


def run(work: Path, shape: str, stages: Sequence[str], threads: int, *, again: bool) -> int:
    """Runs parts in processes of their own and keeps what they say; how many failed."""
    failed = 0
    for stage in stages:
        if not again and stage in read(work, shape):
            continue
        command = [sys.executable, "-m", "benchmarks.real_size", "--work", str(work), "--shape", shape, "--here", stage,
                   "--threads", str(threads)]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            failed += 1
            print(f"{shape} {stage}: ended with {done.returncode}", file=sys.stderr)
            continue
        figures = json.loads(done.stdout.splitlines()[-1])
        print(f"{shape} {stage}: {figures}", file=sys.stderr)
        about = {"machine": {**machine("cpu"), "threads": threads}, "date": datetime.now(UTC).date().isoformat()}
        keep(work, shape, read(work, shape) | {stage: figures | about})
    return min(failed, 1)


def read(work: Path, shape: str) -> dict[str, Any]:
    file = work / f"{shape}.json"
    stages: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return stages


def keep(work: Path, shape: str, stages: dict[str, Any]) -> None:
    fresh = work / f".{shape}.json"
    fresh.write_text(json.dumps(stages, indent=2))
    fresh.replace(work / f"{shape}.json")


# The checkpoint


def make(work: Path, shape: str) -> Path:
    """The checkpoint folder, made where it is not whole yet; no more than one shard is in memory at a time."""
    folder = work / f"Qwen2.5-VL-{shape.upper()}-random"
    if (folder / "config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    network, fields = empty_network(SHAPES[shape], "meta"), SHAPES[shape].fields or {}
    make_weights(network, folder, fields["num_hidden_layers"])
    make_tokenizer(vocabulary(work)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2))
    config = {**fields, **IDS, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def make_weights(network: Any, folder: Path, layers: int) -> None:
    """Shards under the published names, `visual.` and `model.`."""
    tied = network.config.tie_word_embeddings
    names = {name: value.shape for name, value in network.state_dict().items() if not (tied and name == "lm_head.weight")}
    noise = Noise()
    total = sum(2 * shape.numel() for shape in names.values())
    shards: list[dict[str, torch.Tensor]] = []
    shard_of: dict[str, int] = {}
    filled = 0
    with tqdm(total=total, unit="B", unit_scale=True, desc="weights") as bar:
        shard: dict[str, torch.Tensor] = {}
        for name, shape in names.items():
            published = name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
            shard[published] = noise.weights(name, shape, layers)
            shard_of[published] = len(shards)
            filled += 2 * shape.numel()
            bar.update(2 * shape.numel())
            if filled >= SHARD_BYTES:
                save_file(shard, folder / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
                shards.append({})
                shard, filled = {}, 0
        save_file(shard, folder / f"shard-{len(shards):05d}.safetensors", metadata={"format": "pt"})
    count = len(shards) + 1
    for number in range(count):
        (folder / f"shard-{number:05d}.safetensors").rename(folder / _shard(number, count))
    index = {"metadata": {"total_size": total}, "weight_map": {name: _shard(number, count) for name, number in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _shard(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


class Noise:
    """Normal numbers, drawn once and read from another place each time: a checkpoint is made as fast as it is written."""

    def __init__(self) -> None:
        self.draw = torch.Generator().manual_seed(0)
        self.drawn = torch.empty(2**24, dtype=torch.bfloat16).normal_(generator=self.draw)

    def weights(self, name: str, shape: torch.Size, layers: int) -> torch.Tensor:
        """Norms of 1, biases of 0, matrices of a deviation of .02, what is written into the residual stream scaled by depth."""
        if len(shape) == 1:
            return torch.full(shape, 1.0 if "norm" in name or name.endswith("ln_q.weight") else 0.0, dtype=torch.bfloat16)
        written = name.endswith(("o_proj.weight", "down_proj.weight", "attn.proj.weight"))
        start = int(torch.randint(len(self.drawn), (1,), generator=self.draw))
        times = -(-(start + shape.numel()) // len(self.drawn))
        values = self.drawn.repeat(times)[start : start + shape.numel()]
        return (values * (0.02 / (2 * layers) ** 0.5 if written else 0.02)).view(shape)


def vocabulary(work: Path) -> dict[bytes, int]:
    """Qwen's byte sequences and their ranks, from dashscope's wheel, which pip downloads into the scratch folder."""
    if not list(work.glob("dashscope-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(work), "dashscope"]
        subprocess.run(command, check=True, stdout=sys.stderr)
    with zipfile.ZipFile(next(iter(work.glob("dashscope-*.whl")))) as wheel:
        lines = wheel.read("dashscope/resources/qwen.tiktoken").splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


def make_tokenizer(ranks: dict[bytes, int]) -> Any:
    """Qwen2's tokenizer over these ranks: each merge is the pair that makes a sequence out of lower-ranked ones."""
    from tokenizers import AddedToken
    from transformers import Qwen2Tokenizer

    letters = _letters()

    def spelt(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = [_parts(token, rank, ranks) for token, rank in tqdm(ranks.items(), desc="merges") if len(token) > 1]
    made = Qwen2Tokenizer(
        vocab={spelt(token): rank for token, rank in ranks.items()},
        merges=[(spelt(first), spelt(second)) for first, second in merges],
    )
    made.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False) for token in ADDED])
    if (end := made.convert_tokens_to_ids("<|im_end|>")) != IDS["eos_token_id"]:
        raise SystemExit(f"<|im_end|> is token {end}, not {IDS['eos_token_id']}: this is not Qwen's vocabulary")
    made.eos_token, made.pad_token = "<|im_end|>", "<|endoftext|>"
    return made


def _parts(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two sequences that are left of a token where only merges of lower rank are made."""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        pairs = [(ranks.get(first + second, rank), position) for position, (first, second) in enumerate(pairwise(parts))]
        least, position = min(pairs)
        if least >= rank:
            raise SystemExit(f"no merges lead to token {rank}: this is not a vocabulary of byte pairs")
        parts[position : position + 2] = [parts[position] + parts[position + 1]]
    return parts[0], parts[1]


def _letters() -> dict[int, str]:
    """The printable character that stands for each byte, as in GPT-2's byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {byte: chr(byte) for byte in shown} | {byte: chr(256 + number) for number, byte in enumerate(hidden)}


# What is measured


def sample_images() -> Iterator[tuple[tuple[int, int], Image.Image]]:
    """Smooth noise of real sizes, so that resizing and decoding have work to do."""
    draw = np.random.default_rng(0)
    for width, height in SIZES:
        small = Image.fromarray(draw.integers(0, 256, (height // 40, width // 40, 3), dtype=np.uint8))
        yield (width, height), small.resize((width, height), Image.Resampling.BICUBIC)


def texts() -> list[str]:
    words = SENTENCE.split()
    return [" ".join(words[n % len(words)] for n in range(count)) for count in WORDS]


def measured(
    what: str, prepare: Callable[[], Any], work: Callable[[Any], str], timed: Literal["preparing", "work"] = "work"
) -> Measured:
    """Time and peaks of `work` on what `prepare` returns, which is timed apart, or of the preparing."""
    with Peak() as peak:
        began, spent = time.perf_counter(), time.process_time()
        ready = prepare()
        loading, loading_cpu = time.perf_counter() - began, time.process_time() - spent
        began, spent = time.perf_counter(), time.process_time()
        note = work(ready)
        seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    if timed == "preparing":
        seconds, cpu = loading, loading_cpu
    return Measured(what, seconds, cpu, loading, peak_mib("cpu") / 2**10, peak.gib, note)


class Peak:
    """The most private memory of this process while the block runs."""

    def __enter__(self) -> Peak:
        self.gib, self._ended = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            kib = next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)
            self.gib = max(self.gib, kib / 2**20)


def encoder(work: Path, shape: str, **options: Any) -> Encoder:
    return Encoder(load(make(work, shape), dtype=torch.bfloat16, inference=True), **options)


def load_only(work: Path, shape: str) -> Measured:
    def count(encoder: Encoder) -> str:
        weights = sum(parameter.numel() for parameter in encoder.model.network.parameters())
        return f"{weights / 1e9:.3f} billion weights in {next(encoder.model.network.parameters()).dtype}".replace("torch.", "")

    return measured("load", lambda: encoder(work, shape), count, timed="preparing")


def embed_images(work: Path, shape: str) -> Measured:
    """At the image budget of the training presets, which a trained checkpoint keeps."""
    limit = PRESETS[SHAPES[shape].preset]().max_pixels

    def limited() -> Encoder:
        limited = encoder(work, shape)
        limited.model.processor.image = replace(limited.model.processor.image, max_pixels=limit)
        return limited

    return measured(f"{len(SIZES)} images of up to {limit // 784} tokens, one by one", limited, one_by_one)


def embed_whole_images(work: Path, shape: str) -> Measured:
    """At the published budget, of up to 16,384 tokens an image."""
    return measured("the same at the checkpoint's own budget", lambda: encoder(work, shape), one_by_one)


def one_by_one(encoder: Encoder) -> str:
    lines = []
    for (width, height), image in sample_images():
        began, item = time.process_time(), Item.of(image=image)
        check(encoder.encode_items([item])[0].vector)
        lines.append(f"{width}x{height}: {tokens(encoder, item)} tokens, {time.process_time() - began:.0f} s of CPU")
        print(lines[-1], file=sys.stderr)
    return "; ".join(lines)


def embed_texts(work: Path, shape: str) -> Measured:
    def embed(encoder: Encoder) -> str:
        items = [Item.of(text=text) for text in texts()]
        for encoding in encoder.encode_items(items):
            check(encoding.vector)
        return f"{', '.join(str(tokens(encoder, item)) for item in items)} tokens with the prompt"

    return measured(f"{len(WORDS)} texts, one call", lambda: encoder(work, shape), embed)


def reason(work: Path, shape: str) -> Measured:
    def write(encoder: Encoder) -> str:
        shown = [image for _, image in sample_images()]
        queries = [
            Query.of(text="the same, but red", image=shown[0]),
            Query.of(text=SENTENCE),
            Query.of(image=shown[2]),
            Query.of(text="the same at night", image=shown[4]),
        ]
        written = encoder.encode_queries(queries, route="reason")
        for encoding in written:
            check(encoding.vector)
        return f"{', '.join(str(encoding.tokens) for encoding in written)} tokens written behind prompts of " + ", ".join(
            str(tokens(encoder, query)) for query in queries
        )

    return measured(f"4 queries write {WRITTEN} tokens", lambda: encoder(work, shape, max_reasoning_tokens=WRITTEN), write)


def tokens(encoder: Encoder, content: Query | Item) -> int:
    return len(encoder.model.processor.lay_out(encoder.model.prompt(content)))


def check(vector: Any) -> None:
    if not np.isfinite(vector).all() or abs(np.linalg.norm(vector) - 1.0) > 1e-3:
        raise SystemExit(f"not a vector of unit length: {vector[:4]}")


def lora_step(work: Path, shape: str) -> Measured:
    """`traceir train` with the preset of this shape, but for batch, chunks and device: one step, and its checkpoint."""
    data, out = made_pairs(work), work / f"run-{shape}-{os.getpid()}"
    settings = ["epochs=0", "steps=1", f"batch={BATCH}", f"chunk_tokens={CHUNK_TOKENS}", "device=cpu", "workers=0",
                f"threads={torch.get_num_threads()}", "precheck=false", "warmup=0", f"max_pixels={TOKENS * 28 * 28}"]  # fmt: skip
    plan = replace(override(PRESETS[SHAPES[shape].preset](), settings), data=str(data), out=str(out), init=str(make(work, shape)))

    def step(_: object) -> str:
        adapter = train(plan) / "adapter_model.safetensors"
        (line,) = (out / "log.jsonl").read_text().splitlines()
        terms = {name: value for name, value in json.loads(line).items() if name not in ("step", "rate")}
        pairs = ", ".join(f"{name} {value}" for name, value in terms.items())
        spent = json.loads((out / "meta.json").read_text())["seconds_since_last_start"]
        kind = "bfloat16" if json.loads((out / "config.json").read_text())["mixed_precision"] else "float32"
        return f"of which the step {spent:.0f} s; autocast {kind}, {pairs}; adapter of {adapter.stat().st_size / 1e6:.0f} MB"

    return measured(
        f"one LoRA step, batch {BATCH}, images of up to {TOKENS} tokens, chunks of {CHUNK_TOKENS}", lambda: None, step
    )


def made_pairs(work: Path) -> Path:
    """Composed queries with reasoning, and images as candidates, in M-BEIR's layout."""
    root = work / "data"
    if (root / "instructions").is_dir():
        return root
    (root / "mbeir_images").mkdir(parents=True, exist_ok=True)
    for number, (_, image) in enumerate(sample_images()):
        image.save(root / f"mbeir_images/{number}.jpg", quality=90)
    queries, pool, labels = [], [], []
    for number in range(BATCH):
        shown, wanted = (f"mbeir_images/{(number + step) % len(SIZES)}.jpg" for step in range(2))
        queries.append({"qid": f"8:{number}", "query_txt": f"the same with {number} dogs", "query_img_path": shown,
                        "query_src_content": None, "query_modality": "image,text", "pos_cand_list": [f"8:{number + 100}"],
                        "neg_cand_list": [], "task_id": 7})  # fmt: skip
        pool.append({"did": f"8:{number + 100}", "txt": None, "img_path": wanted, "modality": "image", "src_content": None})
        labels.append({"qid": f"8:{number}", "steps": 2, "z": 1, "reasoning": f"{SENTENCE}. " * 4, "answer": SENTENCE})
    for name, records in (
        ("query/train/mbeir_cirr_train.jsonl", queries),
        ("cand_pool/global/mbeir_union_train_cand_pool.jsonl", pool),
        ("cot/train/mbeir_cirr_train_cot.jsonl", labels),
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (root / "instructions").mkdir()
    (root / "instructions/query_instructions.tsv").write_text(
        "query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\nimage,text\timage\tcirr\t8\tchange the picture\n"
    )
    return root


STAGES: Final[dict[str, Callable[[Path, str], Measured]]] = {
    "load": load_only,
    "texts": embed_texts,
    "reason": reason,
    "train": lora_step,
    "pictures": embed_images,
    "whole": embed_whole_images,
}


def report(work: Path) -> str:
    """All that the scratch folder holds, as Markdown."""
    lines = [
        "# Runs at real size", "", *(__doc__ or "").splitlines()[0:1], "",
        "Peaks are of the whole process. What is not private are the pages of the weights' files, which are mapped: the system",
        "may drop them and read them again. Seconds count what other work on the same cores takes, and pauses; those of CPU do",
        "not.", "",
    ]  # fmt: skip
    for shape in ("3b", "7b"):
        stages = read(work, shape)
        if not stages:
            continue
        about = next(iter(stages.values()))["machine"]
        dates = sorted({figures["date"] for figures in stages.values()})
        lines += [
            f"## Qwen2.5-VL-{shape.upper()}", "",
            f"`python -m benchmarks.real_size --shape {shape}`, {' to '.join(dict.fromkeys((dates[0], dates[-1])))}: "
            f"{about['processor']}, {about['cores']} cores, {about['threads']} threads, Python {about['python']}, torch "
            f"{about['torch']}, transformers {about['transformers']}; weights in bfloat16. Other work shared the cores.",
            "",
            "| part | seconds | of CPU | to load before | peak GiB | of which private | |",
            "|---|---:|---:|---:|---:|---:|---|",
        ]  # fmt: skip
        for stage in STAGES:
            if run := stages.get(stage):
                before = "" if stage in ("load", "train") else f"{run['loading']:.0f}"
                times, peaks = f"{run['seconds']:.0f} | {run['cpu']:.0f}", f"{run['peak_gib']:.1f} | {run['private_gib']:.1f}"
                lines.append(f"| {run['what']} | {times} | {before} | {peaks} | {run['note']} |")
        if missing := [stage for stage in STAGES if stage not in stages]:
            lines += ["", f"Not run: {', '.join(missing)}."]
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
