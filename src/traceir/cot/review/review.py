"""Curation by people: which outcomes of a build are shown, what their reviewers settle, and how far they agree.

`OUT/review/sample.json` is the list that every reviewer gets; the decisions lie beside it (`decisions.py`).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from tqdm import tqdm

from traceir.cot.files import write_text
from traceir.cot.outcomes import CotOutcome, read_outcomes
from traceir.cot.review.decisions import Choice, Decision, read_decisions
from traceir.errors import DataError, InputError
from traceir.outside import read_json

Order = Literal["random", "doubt"]

ORDERS: Final = ("random", "doubt")
STRATA: Final = ("task", "status", "rule")
THRESHOLD: Final = 0.7
"""The verifier's yes counts above this confidence (paper, section 3); doubt is the distance from it."""
FORMAT: Final = 1
_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which outcomes are reviewed: at most `per_stratum` of each stratum, of which there is one for all values of `strata`.

    `random` draws by hash of `seed` and qid, whatever the order of the stream; any beginning of a stratum's list is a random
    draw too. `doubt` takes those whose verifier confidence is nearest to the threshold; a stratum that the verifier never saw is
    drawn at random. Raises InputError.
    """

    per_stratum: int = 20
    order: Order = "random"
    strata: Sequence[str] = STRATA
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_stratum < 1 or self.order not in ORDERS or not self.strata or not set(self.strata) <= set(STRATA):
            shown = f"per_stratum {self.per_stratum}, order {self.order!r}, strata {','.join(self.strata)!r}"
            raise InputError(f"{shown}: choose at least 1, an order of {', '.join(ORDERS)}, and strata of {', '.join(STRATA)}")


@dataclass(frozen=True, slots=True)
class Chosen:
    """An outcome to be judged. `how` says how it was drawn from the `size` outcomes of its `stratum`.

    Only those drawn at `random` may enter estimates. `sample` is the hash of what is judged.
    """

    outcome: CotOutcome
    stratum: str
    how: Order
    size: int
    sample: str

    @property
    def images(self) -> list[str | None]:
        """The query's image, then those of the positives; None where there is none."""
        return [self.outcome.case.record.image_path, *(target.image_path for target in self.outcome.case.positives)]


@dataclass(frozen=True, slots=True)
class Settled:
    """What holds for one sample after the review; the texts are those to be used where it is kept."""

    decision: Choice
    reasoning: str
    answer: str
    reviewers: tuple[str, ...]
    edited: bool = False


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two reviewers on the `n` samples that both judged; `kappa`, `low` and `high` (95 %) are nan where undefined."""

    first: str
    second: str
    n: int
    agreed: float
    kappa: float
    low: float
    high: float


def sample_hash(outcome: CotOutcome) -> str:
    """Hash of what a reviewer judges: the query, its positives, the reply, reasoning and answer; 16 hex digits."""
    record = outcome.case.record
    targets = [[target.text or "", target.image_path or ""] for target in outcome.case.positives]
    judged = [record.qid, record.text or "", record.image_path or "", targets, outcome.raw, outcome.reasoning, outcome.answer]
    return hashlib.sha256(json.dumps(judged, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def choose(outcomes: Iterable[CotOutcome], sampling: Sampling, threshold: float = THRESHOLD) -> list[Chosen]:
    """What is to be reviewed, the strata in turn; the same arguments give the same list.

    Direct samples have no reasoning and are left out. Streams: memory holds the chosen alone.
    """
    heaps: dict[str, list[tuple[float, int, int, CotOutcome]]] = defaultdict(list)
    sizes: Counter[str] = Counter()
    doubted: set[str] = set()
    for outcome in tqdm(outcomes, desc="choosing samples", unit="sample", delay=2.0):
        if outcome.status == "direct":
            continue
        parts = {"task": outcome.case.task, "status": outcome.status, "rule": outcome.rule}
        stratum = " / ".join(parts[name] for name in sampling.strata if parts[name]) or "all"
        sizes[stratum] += 1
        doubt = 2.0
        if sampling.order == "doubt" and outcome.verdict_confidence >= 0.0:
            doubt = abs(outcome.verdict_confidence - threshold)
            doubted.add(stratum)
        key = f"{sampling.seed} {outcome.case.task} {outcome.case.record.qid}".encode("utf-8", "surrogatepass")
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=16).digest())
        entry = (-doubt, -draw, sizes[stratum], outcome)  # the worst is at the head, the number unlike any other
        (heapq.heappush if len(heaps[stratum]) < sampling.per_stratum else heapq.heappushpop)(heaps[stratum], entry)
    columns = []
    for stratum in sorted(heaps):
        about: tuple[str, Order, int] = stratum, "doubt" if stratum in doubted else "random", sizes[stratum]
        best = (entry[-1] for entry in sorted(heaps[stratum], reverse=True))
        columns.append([Chosen(outcome, *about, sample_hash(outcome)) for outcome in best])
    return [chosen for row in zip_longest(*columns) for chosen in row if chosen is not None]


def open_sample(out: Path, outcomes: Iterable[CotOutcome], sampling: Sampling, threshold: float = THRESHOLD) -> list[Chosen]:
    """The list of this review: chosen at the first call and kept in `sample.json`, the same ever after.

    Other arguments at a later call change nothing and are warned of, and so are outcomes that are gone or have changed.
    """
    path = out / "review" / "sample.json"
    arguments = asdict(sampling) | {"strata": list(sampling.strata)}
    if not path.exists():
        chosen = choose(outcomes, sampling, threshold)
        if not chosen:
            raise DataError(f"{out}: there is no complex sample to review; run `traceir reasoning build` first")
        _write_sample(path, arguments, chosen)
        return chosen
    kept = _read_sample(path)
    if kept["arguments"] != arguments:
        _logger.warning("%s was drawn with %s and is used as it is; remove it for a fresh list", path, kept["arguments"])
    wanted = {str(entry["qid"]): entry for entry in kept["samples"]}
    present = _find(outcomes, wanted)
    if gone := len(wanted) - len(present):
        _logger.warning("%d of %d samples in %s are no longer there and are left out", gone, len(wanted), path)
    chosen = [
        Chosen(present[qid], entry["stratum"], entry["how"], kept["strata"][entry["stratum"]], sample_hash(present[qid]))
        for qid, entry in wanted.items()
        if qid in present
    ]
    if changed := sum(now.sample != wanted[now.outcome.case.record.qid]["sample"] for now in chosen):
        _logger.warning("%d samples have changed since they were drawn; older decisions on them are not applied", changed)
    return chosen


def _read_sample(path: Path) -> dict[str, Any]:
    """`arguments`, `strata` (name -> size) and `samples` (qid, task, stratum, how, sample)."""
    try:
        content: dict[str, Any] = read_json(path.read_bytes())
        sizes, entries = content["strata"], content["samples"]
        if content["format"] != FORMAT or not all(e["stratum"] in sizes and e["how"] in ORDERS and e["qid"] for e in entries):
            raise ValueError(f"it is not a list of format {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it for a fresh list") from error
    return content


def _write_sample(path: Path, arguments: Mapping[str, Any], chosen: Sequence[Chosen]) -> None:
    samples = [
        {"qid": c.outcome.case.record.qid, "task": c.outcome.case.task, "stratum": c.stratum, "how": c.how, "sample": c.sample}
        for c in chosen
    ]
    content = {"format": FORMAT, "arguments": arguments, "strata": {c.stratum: c.size for c in chosen}, "samples": samples}
    write_text(path, json.dumps(content, indent=1) + "\n")


def _find(outcomes: Iterable[CotOutcome], wanted: Iterable[str]) -> dict[str, CotOutcome]:
    """qid -> outcome; the stream is read no further than needed."""
    missing, present = set(wanted), dict[str, CotOutcome]()
    for outcome in tqdm(outcomes if missing else (), desc="finding samples", unit="sample", delay=2.0):
        if (qid := outcome.case.record.qid) in missing:
            present[qid] = outcome
            missing.remove(qid)
            if not missing:
                break
    return present


def settle(out: Path, outcomes: Iterable[CotOutcome] | None = None) -> dict[str, Settled]:
    """qid -> what the reviewers of a build settled; of a qid that is absent the filter's decision holds.

    `outcomes` default to those of the build, read only if somebody decided something. The majority wins; on a tie the filter's
    own decision stands. The newest edit among those who keep gives the texts. Decisions on a text that has changed since are not
    applied, and warned of. Raises DataError for a broken line.
    """
    votes: dict[str, dict[str, Decision]] = defaultdict(dict)
    for reviewer, latest in read_decisions(out).items():
        for qid, decision in latest.items():
            votes[qid][reviewer] = decision
    present = _find(read_outcomes(out) if outcomes is None and votes else outcomes or (), votes)
    settled: dict[str, Settled] = {}
    unused: list[str] = []
    for qid in sorted(votes):
        outcome = present.get(qid)
        faults = {name: _fault(vote, outcome) for name, vote in votes[qid].items()}
        unused += [f"{qid} by {name}: {fault}" for name, fault in faults.items() if fault]
        applied = {name: vote for name, vote in votes[qid].items() if not faults[name]}
        if outcome is not None and applied:
            settled[qid] = _settle(applied, outcome)
    if unused:
        text = "%s: %d decisions were not applied (first %s); review them again"
        _logger.warning(text, out / "review", len(unused), unused[0])
    return settled


def _fault(vote: Decision, outcome: CotOutcome | None) -> str:
    """Why a decision cannot be applied, "" where it can."""
    if outcome is None:
        return "gone"
    if vote.sample != sample_hash(outcome):
        return "changed"
    return "nothing to keep" if vote.decision == "keep" and not (outcome.reasoning and outcome.answer) else ""


def _settle(votes: Mapping[str, Decision], outcome: CotOutcome) -> Settled:
    keeps = [vote for vote in votes.values() if vote.choice == "keep"]
    more = 2 * len(keeps) - len(votes)
    keep = more > 0 or (more == 0 and outcome.status == "kept")
    edits = [vote for vote in keeps if keep and vote.decision == "edit"]
    edit = max(edits, key=lambda vote: vote.time, default=None)
    source = edit or outcome
    return Settled("keep" if keep else "drop", source.reasoning, source.answer, tuple(sorted(votes)), edit is not None)


def agree(decisions: Mapping[str, Mapping[str, Decision]]) -> list[Agreement]:
    """Each pair of reviewers (reviewer -> qid -> decision) on the samples that both judged while their text was the same; pairs
    without one are left out."""
    agreements = []
    for first, second in combinations(sorted(decisions), 2):
        ours, theirs = decisions[first], decisions[second]
        common = [qid for qid in ours if qid in theirs and ours[qid].sample == theirs[qid].sample]
        if common:
            table = Counter((ours[qid].choice, theirs[qid].choice) for qid in common)
            counts = [table[a, b] for a in ("keep", "drop") for b in ("keep", "drop")]
            share = (counts[0] + counts[3]) / len(common)
            agreements.append(Agreement(first, second, len(common), share, *kappa(*counts)))
    return agreements


def kappa(both_keep: int, keep_drop: int, drop_keep: int, both_drop: int) -> tuple[float, float, float]:
    """Cohen's kappa of a two by two table, and its asymptotic 95 % interval; nan where chance alone agrees always.

    The variance is that of Fleiss, Cohen and Everitt (1969) for kappa other than 0; where all agree it is 0, however few.
    """
    counts = np.array([[both_keep, keep_drop], [drop_keep, both_drop]], float)
    shares = counts / counts.sum()
    rows, columns, observed = shares.sum(1), shares.sum(0), float(shares.trace())
    chance = float(rows @ columns)
    if chance >= 1.0 - 1e-12:
        return math.nan, math.nan, math.nan
    value = (observed - chance) / (1 - chance)
    same = shares.diagonal() @ ((1 - chance) - (rows + columns) * (1 - observed)) ** 2
    other = (1 - observed) ** 2 * np.sum((shares - np.diag(shares.diagonal())) * (columns[:, None] + rows[None, :]) ** 2)
    variance = (same + other - (observed * chance - 2 * chance + observed) ** 2) / (counts.sum() * (1 - chance) ** 4)
    reach = 1.959964 * math.sqrt(max(variance, 0.0))
    return value, max(value - reach, -1.0), min(value + reach, 1.0)


def agreement_table(out: Path) -> str:
    """The agreement of every pair of reviewers as lines of text; one sentence where there is no pair."""
    rows = [("reviewers", "n", "agreed", "kappa", "95 %")]
    for pair in agree(read_decisions(out)):
        value, reach = f"{pair.kappa:.3f}", f"{pair.low:.3f} to {pair.high:.3f}"
        shown = ("undefined", "") if math.isnan(pair.kappa) else (value, reach)
        rows.append((f"{pair.first}, {pair.second}", str(pair.n), f"{100 * pair.agreed:.1f} %", *shown))
    if len(rows) == 1:
        return "no two reviewers have judged the same sample yet"
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
