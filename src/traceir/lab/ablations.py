"""The ablations as data: which runs there are, which tables show them, and what each table claims.

A Variant is a run: the base configuration with some fields replaced, trained and evaluated once for each seed, however many
tables show it. A Line shows one variant by one route, beside the paper's figures where it has them (paper, section 4). A Claim is
a sentence of the paper, or of ours, and the comparisons that must all hold for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from traceir.errors import InputError
from traceir.items import Route
from traceir.suggest import did_you_mean

Kind = Literal["complex", "simple"]
"""The two evaluation rows: one of complex queries, one of simple ones."""
Metric = Literal["R@1", "R@5", "R@10", "speed"]
"""Recall in percent; speed in multiples of the direct route's queries per second."""
Figures = Mapping[tuple[Kind, Metric], float]
Work = Literal["train", "pipeline", "speed"]


@dataclass(frozen=True, slots=True)
class Variant:
    """One run: fields of TrainConfig that differ from the base, and the routes it is evaluated by.

    `preset` takes start and size of the model from another preset. `work`: `train` trains and evaluates; `pipeline` evaluates
    the first of `uses` as the writer before the second as the encoder; `speed` times both. These two train nothing.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    routes: tuple[Route, ...] = ("auto",)
    preset: str = ""
    work: Work = "train"
    uses: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a table: what it is called, the run and route it shows, the paper's figures."""

    label: str
    variant: Variant
    route: Route = "auto"
    paper: Figures = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Comparison:
    """`better` and `worse` are labels of lines; `kind` and `metric` say where the one must beat the other."""

    better: str
    worse: str
    kind: Kind = "complex"
    metric: Metric = "R@5"


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence without its full stop, and the comparisons that must all hold."""

    text: str
    comparisons: tuple[Comparison, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """`paper` names the place in the paper (`text`: no table; "" for a question of ours), `against` the line that differences are
    taken to.

    `about` says how the variants are made and where they depart from the paper; `speed` is the run that times the lines.
    """

    id: str
    title: str
    paper: str
    lines: tuple[Line, ...]
    claims: tuple[Claim, ...]
    against: str
    about: str = ""
    speed: Variant | None = None

    @property
    def variants(self) -> list[Variant]:
        """Each run of the table once, in the order of its lines."""
        found = {line.variant.name: line.variant for line in self.lines}
        if self.speed is not None:
            found[self.speed.name] = self.speed
        return list(found.values())

    def line(self, label: str) -> Line:
        return next(line for line in self.lines if line.label == label)


def choose_tables(names: Sequence[str]) -> list[Table]:
    """The named tables in the order of TABLES; `all` stands for every one. InputError for an unknown name."""
    known = [table.id for table in TABLES]
    if unknown := [name for name in names if name not in (*known, "all")]:
        raise InputError(
            f"table {unknown[0]!r} is unknown{did_you_mean(unknown[0], known)}; choose all, or among {', '.join(known)}"
        )
    if not names:
        raise InputError(f"no table is named; choose all, or among {', '.join(known)}")
    return [table for table in TABLES if "all" in names or table.id in names]


def recalls(at_1: float, at_5: float, at_10: float) -> Figures:
    """The paper's R@1, R@5, R@10 on CIRR."""
    return {("complex", "R@1"): at_1, ("complex", "R@5"): at_5, ("complex", "R@10"): at_10}


def _efficiency(simple: float, complex_: float, simple_speed: float, complex_speed: float) -> Figures:
    """The paper's R@5 on MSCOCO and CIRR, and its queries per second as multiples of direct embedding's (15.68 and 12.15)."""
    return {
        ("simple", "R@5"): simple,
        ("complex", "R@5"): complex_,
        ("simple", "speed"): simple_speed / 15.68,
        ("complex", "speed"): complex_speed / 12.15,
    }


def _beats(better: str, *worse: str, kind: Kind = "complex", metric: Metric = "R@5") -> tuple[Comparison, ...]:
    return tuple(Comparison(better, one, kind, metric) for one in worse)


LORA_RATE: Final = 2e-3
"""Learning rate of the LoRA runs: adapters start at zero and take larger steps than whole weights."""

# The runs

BASE: Final = Variant("base", routes=("auto", "reason", "direct"))
NONE: Final = Variant("none", {"cot": "none"}, routes=("direct", "auto"))
AT_TOKEN: Final = Variant("at-token", {"read_out": "at_token"})
TAGGED: Final = Variant("tagged", {"cot": "tagged"})
ANSWER: Final = Variant("answer", {"cot": "answer"})
REASONING: Final = Variant("reasoning", {"cot": "reasoning"})
BOTH_REASON: Final = Variant("candidates-reason", {"candidates": "reason"})
CANDIDATES_ANSWER: Final = Variant("candidates-answer", {"candidates": "answer"})
LORA: Final = {
    (rank, alpha): Variant(
        f"lora-{rank}-{alpha}", {"lora_rank": rank, "lora_alpha": alpha, "learning_rate": LORA_RATE}
    )
    for rank, alpha in ((2, 4), (4, 8), (16, 32), (16, 64), (32, 64))
}  # fmt: skip
UNTAUGHT: Final = Variant("lambda-0", {"cot": "none", "lambda_gen": 0.0}, routes=("direct",))
HALF_GEN: Final = Variant("lambda-0.5", {"lambda_gen": 0.5})
TWICE_GEN: Final = Variant("lambda-2", {"lambda_gen": 2.0})
SMALL: Final = Variant("backbone-small", preset="ablation-small")
MIDDLE: Final = Variant("backbone-middle", preset="ablation-middle")
COLD: Final = Variant("temperature-0.02", {"temperature": 0.02})
WARM: Final = Variant("temperature-0.1", {"temperature": 0.1})
LEARNT: Final = Variant("temperature-learnt", {"learn_temperature": True})
QUARTER: Final = Variant("share-0.25", {"reasoned": 0.25})
HALF: Final = Variant("share-0.5", {"reasoned": 0.5})
SYMMETRIC: Final = Variant("symmetric", {"symmetric": True})
DISTIL: Final = Variant("distil", {"distil": 0.5}, routes=("auto", "direct"))
DIRECT_RET: Final = Variant("direct-ret", {"direct_ret": 0.5}, routes=("auto", "direct"))
FAMILY: Final = Variant("family-8", {"group": 8})
PIPELINE: Final = Variant("two-stage", routes=("auto", "reason"), work="pipeline", uses=("base", "none"))
SPEED: Final = Variant("speed", routes=(), work="speed", uses=("base", "none"))
TIMED: Final[tuple[tuple[str, Route], ...]] = (("none", "direct"), ("base", "reason"), ("base", "auto"))
"""What SPEED times: variant and route. The first is the measure of the others."""

# The tables

PAPER_BEST: Final = recalls(28.37, 57.03, 68.30)

TABLES: Final[tuple[Table, ...]] = (
    Table(
        "table2",
        "Efficiency against accuracy",
        "Table 2",
        (
            Line("direct embedding", NONE, "direct", _efficiency(87.40, 53.06, 15.68, 12.15)),
            Line("always reasoning", BASE, "reason", _efficiency(63.90, 54.73, 4.45, 3.42)),
            Line("adaptive", BASE, "auto", _efficiency(89.10, 57.03, 8.25, 6.48)),
        ),
        (
            Claim(
                "Adaptive reasoning finds more of the complex targets than direct embedding",
                _beats("adaptive", "direct embedding"),
            ),
            Claim("To reason about every simple query costs recall", _beats("adaptive", "always reasoning", kind="simple")),
            Claim(
                "Adaptive reasoning finds more of the simple targets, too, than direct embedding",
                _beats("adaptive", "direct embedding", kind="simple"),
            ),
            Claim(
                "Adaptive reasoning is faster than reasoning always, on simple and on complex queries",
                (
                    *_beats("adaptive", "always reasoning", kind="simple", metric="speed"),
                    *_beats("adaptive", "always reasoning", metric="speed"),
                ),
            ),
        ),
        against="direct embedding",
        about="Direct embedding is a model of its own, trained on the same pairs with nothing to write; the other two are one "
        "model by two routes. Speed is that of encoding the same queries, the three one after the other in one process and "
        "several times over; it is told as a multiple of direct embedding's.",
        speed=SPEED,
    ),
    Table(
        "table4",
        "Where the embedding is read",
        "Table 4",
        (
            Line("at `<|emb|>`", AT_TOKEN, paper=recalls(24.46, 52.25, 63.81)),
            Line("closing tag", TAGGED, paper=recalls(24.36, 53.06, 63.93)),
            Line("before `<|emb|>`", BASE, paper=PAPER_BEST),
        ),
        (
            Claim(
                "The state before `<|emb|>` is a better embedding than that of `<|emb|>` and that of a closing tag",
                _beats("before `<|emb|>`", "at `<|emb|>`", "closing tag"),
            ),
        ),
        against="before `<|emb|>`",
        about="With the closing tag every reasoning ends in `</answer>` in plain text, so that the state before `<|emb|>` is "
        "the tag's.",
    ),
    Table(
        "table5",
        "What a complex query writes",
        "Table 5",
        (
            Line("nothing", NONE, "direct", recalls(24.52, 53.15, 63.10)),
            Line("answer only", ANSWER, paper=recalls(25.99, 53.67, 64.48)),
            Line("reasoning only", REASONING, paper=recalls(26.38, 53.41, 64.60)),
            Line("reasoning and answer", BASE, paper=PAPER_BEST),
        ),
        (
            Claim(
                "Reasoning and answer together beat either alone, and nothing",
                _beats("reasoning and answer", "nothing", "answer only", "reasoning only"),
            ),
            Claim(
                "Either alone beats nothing",
                (*_beats("answer only", "nothing"), *_beats("reasoning only", "nothing")),
            ),
        ),
        against="reasoning and answer",
        about="The model that writes nothing is the direct baseline of Table 2.",
    ),
    Table(
        "table6",
        "Who reasons: query / candidate",
        "Table 6",
        (
            Line("reasoning / reasoning", BOTH_REASON, paper=recalls(7.75, 18.90, 26.50)),
            Line("reasoning / answer", CANDIDATES_ANSWER, paper=recalls(8.61, 19.78, 26.88)),
            Line("reasoning / nothing", BASE, paper=PAPER_BEST),
        ),
        (
            Claim(
                "Candidates that write before they are embedded are found far less often",
                _beats("reasoning / nothing", "reasoning / reasoning", "reasoning / answer"),
            ),
        ),
        against="reasoning / nothing",
    ),
    Table(
        "table7",
        "Rank and alpha of LoRA",
        "Table 7",
        (
            Line("2/4", LORA[2, 4], paper=recalls(26.67, 56.31, 66.45)),
            Line("4/8", LORA[4, 8], paper=recalls(26.90, 56.19, 67.29)),
            Line("16/32", LORA[16, 32], paper=PAPER_BEST),
            Line("16/64", LORA[16, 64], paper=recalls(27.48, 56.74, 67.84)),
            Line("32/64", LORA[32, 64], paper=recalls(28.19, 56.81, 68.02)),
            Line("all weights", BASE),
        ),
        (
            Claim(
                "The middle rank with twice its alpha is best; less, a larger alpha and a larger rank find fewer",
                _beats("16/32", "2/4", "4/8", "16/64", "32/64"),
            ),
        ),
        against="16/32",
        about="Ranks and alphas are an eighth of the paper's 16/32, 32/64, 128/256, 128/512 and 256/512, whose figures stand "
        f"beside them. The LoRA runs learn at a rate of {LORA_RATE:g}; `all weights` is the base, without adapters and at "
        "its own rate.",
    ),
    Table(
        "table8",
        "Weight of the generation loss",
        "Table 8",
        (
            Line("0", UNTAUGHT, "direct", recalls(24.52, 53.15, 63.10)),
            Line("0.5", HALF_GEN, paper=recalls(26.89, 55.92, 66.80)),
            Line("1", BASE, paper=PAPER_BEST),
            Line("2", TWICE_GEN, paper=recalls(27.01, 55.74, 66.91)),
        ),
        (
            Claim("A weight of 1 beats 0, 0.5 and 2", _beats("1", "0", "0.5", "2")),
            Claim("Any weight above 0 beats 0", (*_beats("0.5", "0"), *_beats("1", "0"), *_beats("2", "0"))),
        ),
        against="1",
        about="Without the loss nothing teaches the model to write or to bypass, so the model of weight 0 is trained on empty "
        "completions and evaluated by the direct route. The paper's figures of weight 0 are those of its Table 5 without "
        "reasoning.",
    ),
    Table(
        "backbone",
        "Size of the model",
        "text",
        (Line("small", SMALL), Line("middle", MIDDLE), Line("base", BASE)),
        (Claim("Larger models reason better", (*_beats("base", "middle"), *_beats("middle", "small"))),),
        against="base",
        about="The paper: Qwen2-VL-2B 50.2, Qwen2-VL-7B 55.6, Qwen2.5-VL-7B 58.8 on average over M-BEIR. Here each size has had "
        "lessons of its own before, of the same kind.",
    ),
    Table(
        "temperature",
        "Temperature of the contrastive loss",
        "",
        (Line("0.02", COLD), Line("0.04", BASE), Line("0.1", WARM), Line("learnt", LEARNT)),
        (
            Claim("A temperature of 0.04 beats 0.02 and 0.1", _beats("0.04", "0.02", "0.1")),
            Claim("A learnt temperature beats 0.04", _beats("learnt", "0.04")),
        ),
        against="0.04",
        about="The paper does not state its temperature.",
    ),
    Table(
        "share",
        "Share of complex training queries that keep their reasoning",
        "",
        (Line("0", NONE, "direct"), Line("0.25", QUARTER), Line("0.5", HALF), Line("1", BASE)),
        (
            Claim("All reasoning is better than half of it, a quarter, and none", _beats("1", "0.5", "0.25", "0")),
            Claim("A quarter of the reasoning is better than none", _beats("0.25", "0")),
        ),
        against="1",
        about="Queries without their reasoning are taught as simple ones. None at all is the direct baseline of Table 2.",
    ),
    Table(
        "two-stage",
        "One model writes, another encodes",
        "text",
        (
            Line("one model", BASE),
            Line("encoder alone", NONE, "direct"),
            Line("two stages", PIPELINE),
            Line("two stages, always reasoning", PIPELINE, "reason"),
        ),
        (
            Claim(
                "One model that reasons and encodes beats a pipeline of two",
                _beats("one model", "two stages", "two stages, always reasoning"),
            ),
            Claim(
                "The pipeline collapses: it finds fewer than its encoder alone",
                _beats("encoder alone", "two stages", "two stages, always reasoning"),
            ),
        ),
        against="one model",
        about="The base model writes; what it wrote is put behind the text of the query; the model without reasoning, which "
        "never saw such text in training, embeds query and candidates.",
    ),
    Table(
        "symmetric",
        "Contrast in both directions",
        "",
        (Line("query to candidate", BASE), Line("both directions", SYMMETRIC)),
        (Claim("A loss in both directions beats the one-sided", _beats("both directions", "query to candidate")),),
        against="query to candidate",
        about="The paper's loss contrasts each query with the candidates of the batch; the other also each candidate with the "
        "queries.",
    ),
    Table(
        "better",
        "What could make it better",
        "",
        (
            Line("base", BASE),
            Line("distilled", DISTIL),
            Line("direct loss too", DIRECT_RET),
            Line("base, by the direct route", BASE, "direct"),
            Line("distilled, by the direct route", DISTIL, "direct"),
            Line("direct loss too, by the direct route", DIRECT_RET, "direct"),
            Line("families of 8", FAMILY),
            Line("learnt temperature", LEARNT),
            Line("both directions", SYMMETRIC),
        ),
        (
            Claim("Distilling the reasoned embedding into the direct one finds more", _beats("distilled", "base")),
            Claim("A retrieval loss on the direct embedding of complex queries finds more", _beats("direct loss too", "base")),
            Claim(
                "Distilling makes the direct route find more of the complex targets",
                _beats("distilled, by the direct route", "base, by the direct route"),
            ),
            Claim(
                "A direct loss makes the direct route find more of the complex targets",
                _beats("direct loss too, by the direct route", "base, by the direct route"),
            ),
            Claim("Larger families of like candidates in a batch find more", _beats("families of 8", "base")),
            Claim("A learnt temperature finds more", _beats("learnt temperature", "base")),
            Claim("A loss in both directions finds more", _beats("both directions", "base")),
        ),
        against="base",
        about="Every candidate has the steps and pairs of the base; what its steps cost is in the column of seconds.",
    ),
)  # fmt: skip
