"""Training configurations of the miniature, by name, beside those of train/presets.py: `traceir train --preset` knows both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from traceir.train import presets
from traceir.train.config import TrainConfig
from traceir.train.small import SmallSize

MINI_DATA: Final = "data/minibeir"
SIZE: Final = SmallSize(hidden=128, layers=4, inner=352, vision_hidden=96, vision_inner=192, initial=0.05)
# What a row counts in the rotation: composed and multi-hop rows need more batches than captions.
WEIGHTS: Final = {
    "cirr_task7": 5.0,
    "fashioniq_task7": 3.0,
    "mscoco_task0": 2.0,
    "nights_task4": 0.5,
    "oven_task6": 0.7,
    "oven_task8": 0.7,
    "infoseek_task6": 1.5,
    "infoseek_task8": 1.5,
}
PRETRAINING: Final = (
    "scenes_naming",
    "scenes_edits",
    "scenes_views",
    "garments_naming",
    "garments_edits",
    "garments_views",
    "news_naming",
    "entities_naming",
    "entities_facts",
    "entities_chains",
)


def teaching(**weights: float) -> dict[str, float]:
    """A weight for every pretraining task of MiniBEIR; 0 for those not named."""
    return {f"lessons_{name}": weights.get(name, 0.0) for name in PRETRAINING}


def mini() -> TrainConfig:
    """The bundled model's one stage of training, after pretraining: the joint objective on MiniBEIR's pairs.

    Pretraining tasks alternate with the pairs. They stand for what a pretrained Qwen2.5-VL brings: it names what it sees, has
    read the encyclopedia and can follow a list of edits.
    """
    beside = teaching(
        scenes_naming=1.0,
        scenes_edits=0.7,
        scenes_views=1.3,
        garments_naming=0.5,
        garments_edits=0.4,
        garments_views=0.6,
        news_naming=0.7,
        entities_naming=0.8,
        entities_facts=1.5,
        entities_chains=0.5,
    )
    return TrainConfig(
        data=MINI_DATA,
        out="out/runs/mini",
        init="out/runs/mini-lessons/checkpoint",
        cache="data/pixels",
        teach="both",
        weights={**WEIGHTS, **beside},
        steps=3600,
        warmup=50,
        learning_rate=1e-3,
        decay=0.45,
        direct_ret=0.5,
        chunk_tokens=2048,
        save_every=250,
        size=SIZE,
    )


def mini_naming() -> TrainConfig:
    """The first pretraining, from random weights: say what an image shows. One skill at a time is learnt fastest."""
    weights = teaching(scenes_naming=1.5, garments_naming=1.0, news_naming=1.0, entities_naming=1.0)
    return replace(
        mini(), out="out/runs/mini-naming", init="random", teach="pretraining", weights=weights, steps=1500, warmup=100, decay=0.0
    )


def mini_words() -> TrainConfig:
    """The second pretraining, nearly all without images: chains of edits upon a state in words, facts, chains of facts."""
    weights = teaching(
        scenes_naming=0.3,
        scenes_edits=2.0,
        garments_naming=0.2,
        garments_edits=1.0,
        news_naming=0.2,
        entities_naming=0.3,
        entities_facts=1.0,
        entities_chains=0.3,
    )
    before = "out/runs/mini-naming/checkpoint"
    return replace(mini_naming(), out="out/runs/mini-words", init=before, weights=weights, steps=2400, warmup=20, seed=1)


def mini_lessons() -> TrainConfig:
    """The last pretraining: all tasks within each step, chains of edits from images among them."""
    weights = teaching(
        scenes_naming=1.0,
        scenes_edits=1.0,
        scenes_views=2.0,
        garments_naming=0.7,
        garments_edits=0.5,
        garments_views=1.0,
        news_naming=0.7,
        entities_naming=0.7,
        entities_facts=1.5,
        entities_chains=0.7,
    )
    before = "out/runs/mini-words/checkpoint"
    return replace(
        mini_naming(),
        out="out/runs/mini-lessons",
        init=before,
        weights=weights,
        steps=1600,
        warmup=20,
        batch=16,
        accumulate=4,
        seed=2,
    )


def mini_direct() -> TrainConfig:
    """The baseline of `mini`: same start, pairs, order, pretraining and updates; no pair reasons."""
    return replace(mini(), out="out/runs/mini-direct", cot="none")


def mini_direct_long() -> TrainConfig:
    """The baseline with more updates, since its steps are cheaper: about the wall time of `mini`.

    Until the learning rate of `mini-direct` falls, the two are one run; that step is kept, to resume `mini-direct` from.
    """
    short = mini_direct()
    falls = round(short.steps * (1 - short.decay))
    return replace(short, out="out/runs/mini-direct-long", steps=round(short.steps * 1.27), keep=(falls,))


def ablation() -> TrainConfig:
    """The base of `traceir ablate`: the paper's single stage in miniature, on composed queries and some simple ones.

    It starts from pretraining, which stands for a pretrained Qwen2.5-VL, with the vision encoder frozen (paper, section 2).
    """
    chosen = {"cirr_task7": 2.0, "mscoco_task3": 1.0}
    others = ("edis_task2", "fashion200k_task0", "fashion200k_task3", "fashioniq_task7", "infoseek_task6", "infoseek_task8",
              "mscoco_task0", "nights_task4", "oven_task6", "oven_task8", "visualnews_task0", "visualnews_task3", "webqa_task1",
              "webqa_task2")  # fmt: skip
    return replace(
        mini(), out="out/ablate", teach="pairs", weights={**dict.fromkeys(others, 0.0), **chosen}, steps=100, warmup=10,
        decay=0.4, direct_ret=0.0, train_vision=False, save_every=1000, log_every=10, precheck=False,
    )  # fmt: skip


def sized(stage: Callable[[], TrainConfig], name: str, size: SmallSize) -> Callable[[], TrainConfig]:
    """A stage of another size: the same training, after the pretraining of its own size."""

    def config() -> TrainConfig:
        same = stage()
        init, out = (place.replace("out/runs/mini-", f"out/runs/{name}-") for place in (same.init, same.out))
        return replace(same, init=init, out=out, size=size)

    return config


SIZES: Final = {
    "small": replace(SIZE, hidden=64, inner=176, layers=3),
    "middle": replace(SIZE, hidden=96, inner=264),
}
"""Smaller backbones for `traceir ablate backbone`; the base has a width of 128 in 4 layers."""


def emoji() -> TrainConfig:
    """A small model from random weights on a few thousand real images."""
    return TrainConfig(
        data="data/emoji",
        out="out/runs/emoji",
        steps=1600,
        learning_rate=1e-3,
        batch=64,
        group=2,
        size=SmallSize(
            hidden=128, layers=3, inner=352, vision_hidden=96, vision_inner=192, pixels=48, vocabulary=2600, initial=0.05
        ),
        weight_decay=0.1,
        temperature=0.05,
        augment=3,
        decay=0.4,
    )  # fmt: skip


PRESETS: Final[presets.Presets] = {
    "mini": mini,
    "mini-naming": mini_naming,
    "mini-words": mini_words,
    "mini-lessons": mini_lessons,
    "mini-direct": mini_direct,
    "mini-direct-long": mini_direct_long,
    "ablation": ablation,
    **{
        f"{prefix}{name}{suffix}": sized(stage, name, size)
        for name, size in SIZES.items()
        for prefix, suffix, stage in (
            ("", "-naming", mini_naming),
            ("", "-words", mini_words),
            ("", "-lessons", mini_lessons),
            ("ablation-", "", ablation),
        )
    },
    "emoji": emoji,
    **presets.PRESETS,
}


def resolve(name: str, **places: Any) -> TrainConfig:
    """As `presets.resolve`, for all presets."""
    return presets.resolve(name, presets=PRESETS, **places)


def stages_before(name: str) -> list[str]:
    """As `presets.stages_before`, for all presets."""
    return presets.stages_before(name, PRESETS)
