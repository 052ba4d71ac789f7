"""Small tasks of mteb's own classes, one of each kind that MIEB has, over drawn pictures; for `traceir mteb --tasks-from`."""

from __future__ import annotations

import os
import time
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
    letters = {"t": "text", "i": "image"}
    found = {letters[letter] for letter in category if letter in letters}
    options = {"eval_langs": ["eng-Latn"], "modalities": sorted(found), **more}
    return TaskMetadata(
        name=name, type=type, category=category, main_score=main_score, description="Drawn for a test.",
        dataset={"path": "drawn", "revision": "1"}, eval_splits=["test"], **options,
    )  # fmt: skip


def rows(**columns: Any) -> Dataset:
    """A data set of columns; those of pictures are told by their first value."""
    kinds = {name: ImageFeature() for name, values in columns.items() if isinstance(values[0], Image.Image)}
    whole = Dataset.from_dict({name: values for name, values in columns.items() if name not in kinds})
    features = Features({**whole.features, **kinds})
    return Dataset.from_dict(columns, features=features)


class Drawn:
    """load_data of a task that knows its splits."""

    data_loaded = False

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = DatasetDict(self.splits())
        self.data_loaded = True


class DrawnClassification(Drawn, AbsTaskClassification):
    metadata = described("DrawnClassification", "ImageClassification", "i2c", "accuracy")
    input_column_name, samples_per_label, n_experiments = "webp", 2, 2

    def splits(self) -> dict[str, Dataset]:
        return {name: rows(webp=[draw(n) for n in numbers], label=[n % 4 for n in numbers])
                for name, numbers in (("train", range(12)), ("test", range(20, 28)))}  # fmt: skip


class DrawnMultilabel(Drawn, AbsTaskMultilabelClassification):
    metadata = described("DrawnMultilabel", "ImageClassification", "i2c", "accuracy")
    input_column_name, samples_per_label, n_experiments = "image", 3, 2

    def splits(self) -> dict[str, Dataset]:
        return {name: rows(image=[draw(n) for n in numbers], label=[[n % 4, 4 + n % 2] for n in numbers])
                for name, numbers in (("train", range(12)), ("test", range(20, 28)))}  # fmt: skip


class DrawnClusteringLegacy(Drawn, AbsTaskClusteringLegacy):
    metadata = described("DrawnClusteringLegacy", "ImageClustering", "i2c", "nmi")
    input_column_name, label_column_name = "img", "label"

    def splits(self) -> dict[str, Dataset]:
        return {"test": rows(img=[draw(n) for n in range(12)], label=[n % 4 for n in range(12)])}


class DrawnClustering(Drawn, AbsTaskClustering):
    metadata = described("DrawnClustering", "ImageClustering", "i2c", "v_measure")
    input_column_name, label_column_name = "image", "label"
    max_fraction_of_documents_to_embed, n_clusters, max_documents_per_cluster = None, 2, 12

    def splits(self) -> dict[str, Dataset]:
        return {"test": rows(image=[draw(n) for n in range(12)], label=[n % 4 for n in range(12)])}


class DrawnZeroShot(Drawn, AbsTaskZeroShotClassification):
    metadata = described("DrawnZeroShot", "ZeroShotClassification", "i2t", "accuracy")

    def splits(self) -> dict[str, Dataset]:
        return {"test": rows(image=[draw(n) for n in range(16)], label=[n % 4 for n in range(16)])}

    def get_candidate_labels(self) -> list[str]:
        return [f"a drawing of a {colour} square" for colour in COLOURS]


class DrawnPairs(Drawn, AbsTaskImageTextPairClassification):
    """Winoground's form: two pictures and two captions a sample."""

    metadata = described("DrawnPairs", "Compositionality", "i2t", "accuracy")
    images_column_names, texts_column_names = ("image_0", "image_1"), ("caption_0", "caption_1")

    def splits(self) -> dict[str, Dataset]:
        first, second = [*range(12)], [*range(1, 13)]
        return {"test": rows(image_0=[draw(n) for n in first], image_1=[draw(n) for n in second],
                             caption_0=[say(n) for n in first], caption_1=[say(n) for n in second])}  # fmt: skip


class DrawnOrder(Drawn, AbsTaskImageTextPairClassification):
    """ARO's form: a picture, the true caption, false ones."""

    metadata = described("DrawnOrder", "Compositionality", "i2t", "text_acc")
    images_column_names, texts_column_names = ("images",), ("true", "false")

    def splits(self) -> dict[str, Dataset]:
        return {
            "test": rows(
                images=[draw(n) for n in range(8)], true=[say(n) for n in range(8)], false=[say(n + 2) for n in range(8)]
            )
        }


class DrawnSTS(Drawn, AbsTaskSTS):
    metadata = described("DrawnSTS", "VisualSTS(eng)", "i2i", "cosine_spearman")
    shift = 1

    def splits(self) -> dict[str, Dataset]:
        numbers = [*range(12)]
        others = [n * (n + self.shift) // 2 + 1 for n in numbers]  # never n itself: ties would be broken by rounding
        scores = [5.0 * (n % 4 == m % 4) + n / 20 for n, m in zip(numbers, others, strict=True)]
        return {"test": rows(sentence1=[draw(n) for n in numbers], sentence2=[draw(m) for m in others], score=scores)}


class DrawnSTSMore(DrawnSTS):
    metadata = described("DrawnSTSMore", "VisualSTS(multi)", "i2i", "cosine_spearman")
    shift = 2


class DrawnTextSTS(Drawn, AbsTaskSTS):
    metadata = described("DrawnTextSTS", "STS", "t2t", "cosine_spearman")

    def splits(self) -> dict[str, Dataset]:
        return {"test": rows(sentence1=[say(n) for n in range(8)], sentence2=[say(n * n) for n in range(8)],
                             score=[5.0 * (n % 4 == n * n % 4) for n in range(8)])}  # fmt: skip


class DrawnBoth(AbsTaskAggregate):
    metadata = AggregateTaskMetadata(
        name="DrawnBoth", description="Drawn for a test.", tasks=[DrawnSTS(), DrawnSTSMore()], type="VisualSTS(eng)",
        category="i2i", main_score="cosine_spearman", eval_splits=["test"], eval_langs=["eng-Latn"], modalities=["image"],
    )  # fmt: skip


class DrawnSearch(AbsTaskRetrieval):
    """Eight queries over eight documents, of which documents of the same colour are right; sides by the category."""

    k_values = (1, 3, 5, 10)
    subsets: tuple[str, ...] = ("default",)
    choices = 0
    data_loaded = False

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        self.dataset = {subset: {"test": self.split(100 * place)} for place, subset in enumerate(self.subsets)}
        self.data_loaded = True

    def split(self, start: int) -> dict[str, Any]:
        asked, offered = self.metadata.category.split("2")
        numbers = range(start, start + 8)
        documents = {f"d{n}": n for n in range(start + 20, start + 28)}
        right = {f"q{n}": {id: 1 for id, m in documents.items() if m % 4 == n % 4} for n in numbers}
        top = None
        if self.choices:
            top = {
                qid: [*list(found)[:1], *[id for id in documents if id not in found][: self.choices - 1]]
                for qid, found in right.items()
            }
            right = {qid: {id: int(id in found) for id in top[qid]} for qid, found in right.items()}
        return {"queries": self.side(asked, [f"q{n}" for n in numbers], [*numbers]), "top_ranked": top,
                "corpus": self.side(offered, [*documents], [*documents.values()]), "relevant_docs": right}  # fmt: skip

    def side(self, letters: str, ids: list[str], numbers: list[int]) -> Dataset:
        columns: dict[str, Any] = {"id": ids}
        if "t" in letters:
            columns["text"] = [say(n) for n in numbers]
        if "i" in letters:
            columns["image"] = [draw(n) for n in numbers]
        return rows(**columns)


class DrawnI2T(DrawnSearch):
    metadata = described("DrawnI2T", "Any2AnyRetrieval", "i2t", "ndcg_at_10")


class DrawnI2I(DrawnSearch):
    metadata = described(
        "DrawnI2I", "Any2AnyRetrieval", "i2i", "hit_rate_at_1", prompt={"query": "Find a picture of the same colour."}
    )


class DrawnIT2I(DrawnSearch):
    metadata = described("DrawnIT2I", "Any2AnyRetrieval", "it2i", "ndcg_at_10")


class DrawnIT2IT(DrawnSearch):
    metadata = described("DrawnIT2IT", "Any2AnyRetrieval", "it2it", "ndcg_at_10")


class DrawnT2T(DrawnSearch):
    metadata = described("DrawnT2T", "Retrieval", "t2t", "ndcg_at_10")


class DrawnPages(DrawnSearch):
    metadata = described("DrawnPages", "DocumentUnderstanding", "t2i", "ndcg_at_5")


class DrawnTongues(DrawnSearch):
    subsets = ("en", "de")
    metadata = described("DrawnTongues", "Any2AnyMultilingualRetrieval", "t2i", "ndcg_at_10",
                         eval_langs={"en": ["eng-Latn"], "de": ["deu-Latn"]})  # fmt: skip


class DrawnChoice(DrawnSearch):
    choices = 3
    metadata = described("DrawnChoice", "VisionCentricQA", "it2t", "accuracy")


class DrawnRerank(DrawnSearch):
    choices = 4
    metadata = described("DrawnRerank", "Reranking", "t2t", "map_at_5")


class DrawnAudio(DrawnTextSTS):
    metadata = described("DrawnAudio", "STS", "t2t", "cosine_spearman", modalities=["audio", "text"])


class DrawnAbsent(DrawnTextSTS):
    metadata = described("DrawnAbsent", "STS", "t2t", "cosine_spearman")

    def splits(self) -> dict[str, Dataset]:
        raise ConnectionError("Couldn't reach 'drawn' on the Hub")


class DrawnSlow(DrawnTextSTS):
    """Waits while $DRAWN_WAIT is set."""

    metadata = described("DrawnSlow", "STS", "t2t", "cosine_spearman")

    def splits(self) -> dict[str, Dataset]:
        while os.environ.get("DRAWN_WAIT"):
            time.sleep(0.05)
        return super().splits()
