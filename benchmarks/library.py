"""Real images under a model of sentence-transformers: indexed, searched and served, each against the library's own vectors.

`python -m benchmarks.library FOLDER` takes the first 300 images below a folder, and a small random CLIP, made here and saved
by the library; `--model` takes any other. Prints what was added and the greatest differences; ends with 1 where one reaches 1e-6.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np

from traceir.client import Client, ServedEncoder
from traceir.images import SUFFIXES, ImageInput
from traceir.index import open_index
from traceir.items import Item, Query, Vector

MOST: Final = 1e-6
WORDS: Final = ("a smiling face", "a red flag", "an animal with a tail")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="images, also in folders below")
    parser.add_argument("--count", type=int, default=300, metavar="N", help="images taken (default: 300)")
    parser.add_argument("--model", metavar="M", help="folder or hub id (default: a small random CLIP)")
    args = parser.parse_args(arguments)
    files = sorted(file for file in args.folder.rglob("*") if file.suffix.lower() in SUFFIXES)
    images = [file.absolute() for file in files[: args.count]]
    with tempfile.TemporaryDirectory() as scratch:
        model = args.model or str(make_clip(Path(scratch) / "clip"))
        return compare(images, model, Path(scratch) / "index")


def compare(images: Sequence[Path], model: str, index: Path) -> int:
    from sentence_transformers import SentenceTransformer

    own = SentenceTransformer(model.removeprefix("st:"))
    loaded = [ImageInput.open(file).load() for file in images]
    wanted = unit(own.encode_document(loaded, batch_size=16))
    asked = unit(own.encode_query(list(WORDS)))
    print(f"{len(images)} images, {len({image.size for image in loaded})} sizes; model {model}, width {wanted.shape[1]}")
    print("index add:", traceir("index", "add", *map(str, images), "--index", str(index), "--model", model).strip())
    names = [file.name for file in images]
    with open_index(index) as opened:
        stored = opened.get(names, with_vectors=True)
    off = {"index": far([stored[name].vector for name in names], wanted)}
    scores = asked @ wanted.T
    for row, words in enumerate(WORDS):
        hits = json.loads(traceir("search", words, "--index", str(index), "--model", model, "--json", "-k", "5"))["hits"]
        off[f"search {words!r}"] = far([hit["score"] for hit in hits], np.sort(scores[row])[: -len(hits) - 1 : -1])
    with serving(index, model) as url, Client(url) as client:
        vectors = [encoding.vector for encoding in ServedEncoder(client).encode_items([Item.of(image=file) for file in images])]
        off["server, images"] = far(vectors, wanted)
        for row, words in enumerate(WORDS):
            answered = client.search(Query.of(text=words), k=5).hits
            off[f"server, {words!r}"] = far([hit.score for hit in answered], np.sort(scores[row])[: -len(answered) - 1 : -1])
    for name, difference in off.items():
        print(f"{name:32} greatest difference {difference:.1e}")
    return 1 if max(off.values()) >= MOST else 0


def traceir(*arguments: str) -> str:
    command = [sys.executable, "-m", "traceir", *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@contextmanager
def serving(index: Path, model: str) -> Iterator[str]:
    """`traceir serve` on a free port, ended behind the block; yields its address."""
    command = [sys.executable, "-m", "traceir", "serve", "--index", str(index), "--model", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().split(" at ")[1].strip().rstrip("/")
            while not is_ready(url):
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()


def is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=10):
            return True
    except urllib.error.HTTPError:
        return False


def unit(vectors: Any) -> Vector:
    made: Vector = np.asarray(vectors, dtype=np.float32)
    return made / np.linalg.norm(made, axis=1, keepdims=True)


def far(actual: Any, wanted: Any) -> float:
    return float(np.abs(np.asarray(actual, dtype=np.float64) - np.asarray(wanted, dtype=np.float64)).max())


def make_clip(folder: Path) -> Path:
    """A random CLIP of 64 numbers a vector, with a tokenizer of bytes, in the library's layout."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    torch.manual_seed(0)
    known = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    words = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(known)}, merges=[], unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **size,
        "vocab_size": len(known),
        "max_position_embeddings": 77,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    vision = {**size, "image_size": 64, "patch_size": 16}
    bare = folder.with_name("bare")
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64)).save_pretrained(bare)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=77
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(bare)
    SentenceTransformer(modules=[Transformer(str(bare))]).save_pretrained(str(folder))
    return folder


if __name__ == "__main__":
    sys.exit(main())
