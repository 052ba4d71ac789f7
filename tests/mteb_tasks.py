"""Small tasks of mteb's own classes, one of each kind that MIEB has, over drawn images; for `traceir mteb --tasks-from`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from mteb.abstasks import (
    AbsTaskClassification,
    AbsTaskClustering,
    AbsTaskClusteringLegacy,
    AbsTaskMultilabelClassification,
    AbsTaskRetrieval,
    AbsTaskSTS,
    AbsTaskZeroShotClassification,
)
from mteb.abstasks.aggregate_task_metadata import AggregateTaskMetadata
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.abstasks.image.image_text_pair_classification import AbsTaskImageTextPairClassification
from mteb.abstasks.task_metadata import TaskMetadata
from PIL import Image, ImageDraw

COLOURS = ("red", "green", "blue", "orange")
ABOUT: dict[str, Any] = {"description": "Drawn for a test.", "eval_splits": ["test"], "eval_langs": ["eng-Latn"]}


def draw(number: int) -> Image.Image:
    """A square of the number's colour somewhere on grey; sizes and modes differ."""
    random = np.random.default_rng(number)
    image = Image.new("RGB", (56 + 4 * (number % 5), 56 + 8 * (number % 3)), (235, 235, 235))
    left, top = (int(value) for value in random.integers(2, 24, 2))
    ImageDraw.Draw(image).rectangle((left, top, left + 24, top + 24), fill=COLOURS[number % 4])
    return image.convert("RGBA") if number % 7 == 3 else image


def say(number: int) -> str:
    return f"A {COLOURS[number % 4]} square{' on grey, near the left edge' if number % 3 else ''}."


def described(name: str, type: str, category: str, main_score: str, **more: Any) -> TaskMetadata:
    modalities = sorted({word for letter, word in (("t", "text"), ("i", "image")) if letter in category})
    options = ABOUT | {"modalities": modalities, "dataset": {"path": "drawn", "revision": "1"}} | more
    return TaskMetadata(name=name, type=type, category=category, main_score=main_score, **options)


def rows(**columns: Any) -> Dataset:
    """A data set of columns; those of images are told by their first value."""
    kinds = {name: ImageFeature() for name, values in columns.items() if isinstance(values[0], Image.Image)}
    whole = Dataset.from_dict({name: values for name, values in columns.items() if name not in kinds})
    return Dataset.from_dict(columns, features=Features({**whole.features, **kinds}))


class Drawn:
    """load_data of a task whose splits are numbers, and whose columns are functions of a number."""

    data_loaded = False
    numbers: Mapping[str, Sequence[int]]
    columns: Mapping[str, Callable[[int], Any]]

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        splits = {
            split: rows(**{name: [make(number) for number in numbers] for name, make in self.columns.items()})
            for split, numbers in self.numbers.items()
        }
        self.dataset, self.data_loaded = DatasetDict(splits), True


def made(
    base: Any, name: str, about: tuple[str, str, str], columns: Mapping[str, Any], more: Mapping[str, Any] = ABOUT, **options: Any
) -> Any:
    """A class of one of mteb's classes; `about` is its type, category and main score."""
    numbers = {"test": range(12)}
    own = {"metadata": described(name, *about, **more), "columns": columns, "numbers": numbers, "__module__": __name__}
    return type(name, (Drawn, base), own | options)


def colour(number: int) -> int:
    return number % 4


TRAINED = {"train": range(12), "test": range(20, 28)}
CLASSES, CLUSTERS = ("ImageClassification", "i2c", "accuracy"), {"input_column_name": "img", "label_column_name": "label"}
DrawnClassification = made(
    AbsTaskClassification, "DrawnClassification", CLASSES, {"webp": draw, "label": colour}, numbers=TRAINED,
    input_column_name="webp", samples_per_label=2, n_experiments=2,
)  # fmt: skip
DrawnMultilabel = made(
    AbsTaskMultilabelClassification, "DrawnMultilabel", CLASSES, {"image": draw, "label": lambda n: [n % 4, 4 + n % 2]},
    numbers=TRAINED, input_column_name="image", samples_per_label=3, n_experiments=2,
)  # fmt: skip
DrawnClusteringLegacy = made(
    AbsTaskClusteringLegacy,
    "DrawnClusteringLegacy",
    ("ImageClustering", "i2c", "nmi"),
    {"img": draw, "label": colour},
    **CLUSTERS,
)
DrawnClustering = made(
    AbsTaskClustering, "DrawnClustering", ("ImageClustering", "i2c", "v_measure"), {"img": draw, "label": colour}, **CLUSTERS,
    max_fraction_of_documents_to_embed=None, n_clusters=2, max_documents_per_cluster=12,
)  # fmt: skip
LABELS = [f"a drawing of a {colour} square" for colour in COLOURS]
DrawnZeroShot = made(
    AbsTaskZeroShotClassification, "DrawnZeroShot", ("ZeroShotClassification", "i2t", "accuracy"),
    {"image": draw, "label": colour}, numbers={"test": range(16)}, get_candidate_labels=lambda task: LABELS,
)  # fmt: skip
DrawnPairs = made(  # Winoground's form: two images and two captions a sample
    AbsTaskImageTextPairClassification, "DrawnPairs", ("Compositionality", "i2t", "accuracy"),
    {"image_0": draw, "image_1": lambda n: draw(n + 1), "caption_0": say, "caption_1": lambda n: say(n + 1)},
    images_column_names=("image_0", "image_1"), texts_column_names=("caption_0", "caption_1"),
)  # fmt: skip
DrawnOrder = made(  # ARO's form: an image, the true caption, false ones
    AbsTaskImageTextPairClassification, "DrawnOrder", ("Compositionality", "i2t", "text_acc"),
    {"images": draw, "true": say, "false": lambda n: say(n + 2)}, numbers={"test": range(8)},
    images_column_names=("images",), texts_column_names=("true", "false"),
)  # fmt: skip


def pairs(
    name: str, type: str, make: Callable[[int], Any], other: Callable[[int], int], more: Any = ABOUT, **options: Any
) -> Any:
    """Pairs of numbers, never the same twice: ties would be broken by rounding."""
    columns = {
        "sentence1": make,
        "sentence2": lambda n: make(other(n)),
        "score": lambda n: 5.0 * (n % 4 == other(n) % 4) + n / 20,
    }
    category = "i2i" if make is draw else "t2t"
    return made(AbsTaskSTS, name, (type, category, "cosine_spearman"), columns, more, **options)


DrawnSTS = pairs("DrawnSTS", "VisualSTS(eng)", draw, lambda n: n * (n + 1) // 2 + 1)
DrawnSTSMore = pairs("DrawnSTSMore", "VisualSTS(multi)", draw, lambda n: n * n + 1)
DrawnTextSTS = pairs("DrawnTextSTS", "STS", say, lambda n: n * n)
DrawnAudio = pairs("DrawnAudio", "STS", say, lambda n: n * n, {"modalities": ["audio", "text"]})


def unreachable(task: Any, num_proc: int | None = None, **_: Any) -> None:
    raise ConnectionError("Couldn't reach 'drawn' on the Hub")


def waiting(task: Any, num_proc: int | None = None, **_: Any) -> None:
    """Waits while $DRAWN_WAIT is set."""
    while os.environ.get("DRAWN_WAIT"):
        time.sleep(0.05)
    Drawn.load_data(task)


DrawnAbsent = pairs("DrawnAbsent", "STS", say, lambda n: n * n, load_data=unreachable)
DrawnSlow = pairs("DrawnSlow", "STS", say, lambda n: n * n, load_data=waiting)


class DrawnBoth(AbsTaskAggregate):
    metadata = AggregateTaskMetadata(
        name="DrawnBoth", tasks=[DrawnSTS(), DrawnSTSMore()], type="VisualSTS(eng)", category="i2i", modalities=["image"],
        main_score="cosine_spearman", **ABOUT,
    )  # fmt: skip


class DrawnSearch(AbsTaskRetrieval):
    """Eight queries over eight documents, of which documents of the same colour are right; sides by the category."""

    k_values = (1, 3, 5, 10)
    subsets: tuple[str, ...]
    choices: int
    data_loaded = False

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = {subset: {"test": self.split(100 * index)} for index, subset in enumerate(self.subsets)}
        self.data_loaded = True

    def split(self, start: int) -> dict[str, Any]:
        asked, offered = self.metadata.category.split("2")
        queries = {f"q{n}": n for n in range(start, start + 8)}
        documents = {f"d{n}": n for n in range(start + 20, start + 28)}
        right = {qid: {id: 1 for id, m in documents.items() if m % 4 == n % 4} for qid, n in queries.items()}
        top = None
        if self.choices:
            wrong = {qid: [id for id in documents if id not in own][: self.choices - 1] for qid, own in right.items()}
            top = {qid: [next(iter(own)), *wrong[qid]] for qid, own in right.items()}
            right = {qid: {id: int(id in own) for id in top[qid]} for qid, own in right.items()}
        return {"queries": self.side(asked, queries), "corpus": self.side(offered, documents), "relevant_docs": right,
                "top_ranked": top}  # fmt: skip

    def side(self, letters: str, numbers: dict[str, int]) -> Dataset:
        columns = {"text": say, "image": draw}
        made = {name: [make(n) for n in numbers.values()] for name, make in columns.items() if name[0] in letters}
        return rows(id=[*numbers], **made)


def search(name: str, type_: str, category: str, metric: str, choices: int = 0, **more: Any) -> Any:
    about = {"metadata": described(name, type_, category, metric, **more), "choices": choices, "__module__": __name__}
    return type(name, (DrawnSearch,), about | {"subsets": tuple(more.get("eval_langs", ("default",)))})


TONGUES = {"en": ["eng-Latn"], "de": ["deu-Latn"]}
DrawnI2T = search("DrawnI2T", "Any2AnyRetrieval", "i2t", "ndcg_at_10")
PROMPT = {"query": "Find an image of the same colour."}
DrawnI2I = search("DrawnI2I", "Any2AnyRetrieval", "i2i", "hit_rate_at_1", prompt=PROMPT)
DrawnIT2I = search("DrawnIT2I", "Any2AnyRetrieval", "it2i", "ndcg_at_10")
DrawnIT2IT = search("DrawnIT2IT", "Any2AnyRetrieval", "it2it", "ndcg_at_10")
DrawnT2T = search("DrawnT2T", "Retrieval", "t2t", "ndcg_at_10")
DrawnPages = search("DrawnPages", "DocumentUnderstanding", "t2i", "ndcg_at_5")
DrawnTongues = search("DrawnTongues", "Any2AnyMultilingualRetrieval", "t2i", "ndcg_at_10", eval_langs=TONGUES)
DrawnChoice = search("DrawnChoice", "VisionCentricQA", "it2t", "accuracy", 3)
DrawnRerank = search("DrawnRerank", "Reranking", "t2t", "map_at_5", 4)
