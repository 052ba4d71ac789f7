"""Curation by people: which outcomes of a build are shown, what their reviewers settle, and how far they agree.

`OUT/review/sample.json` is the list that every reviewer gets; the decisions lie beside it (`decisions.py`).
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, zip_longest
from pathlib import Path
from typing import Any, Final, Literal, cast

from tqdm import tqdm

from traceir.cot.outcomes import CotOutcome
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
class Chosen:
    """An outcome to be judged. `how` says how it was drawn from the `size` outcomes of its `stratum`.

    Only those drawn at `random` may enter estimates. `sample` is the hash of what is judged.
    """

    outcome: CotOutcome
    stratum: str
    how: Order
    size: int
    sample: str


@dataclass(frozen=True, slots=True)
class Settled:
    """What holds for one sample after the review; the texts are those to be used where it is kept."""

    decision: Choice
    reasoning: str
    answer: str
    reviewers: tuple[str, ...]
    edited: bool = False


@dataclass(frozen=True, slots=True)
class Unused:
    """A decision that was not applied, and why: the sample `changed`, is `gone`, or has `nothing to keep`."""

    reviewer: str
    qid: str
    why: str


@dataclass(frozen=True, slots=True)
class Settlement:
    """qid -> what its reviewers settled; a qid that is absent keeps what the filter decided."""

    settled: Mapping[str, Settled]
    unused: tuple[Unused, ...] = ()
    ties: int = 0


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


# Sampling


def sample_hash(outcome: CotOutcome) -> str:
    """Hash of what a reviewer judges: the query, its positives, the reply, reasoning and answer; 16 hex digits."""
    record = outcome.case.record
    shown = [[one.text or "", one.image_path or ""] for one in outcome.case.positives]
    judged = [record.qid, record.text or "", record.image_path or "", shown, outcome.raw, outcome.reasoning, outcome.answer]
    return hashlib.sha256(json.dumps(judged, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def choose(
    outcomes: Iterable[CotOutcome], *, per_stratum: int, order: Order = "random", strata: Sequence[str] = STRATA, seed: int = 0,
    threshold: float = THRESHOLD,
) -> list[Chosen]:  # fmt: skip
    """At most `per_stratum` outcomes of each stratum, the strata in turn; the same arguments give the same list.

    `random` draws by hash of seed and qid, whatever the order of the stream; any beginning of a stratum's list is a random
    draw too. `doubt` takes those whose verifier confidence is nearest to `threshold`; a stratum that the verifier never saw is
    drawn at random. Direct samples have no reasoning and are left out. Streams: memory holds the chosen alone. Raises InputError.
    """
    if per_stratum < 1 or order not in ORDERS or not strata or not set(strata) <= set(STRATA):
        shown = f"per_stratum {per_stratum}, order {order!r}, strata {','.join(strata)!r}"
        raise InputError(f"{shown}: choose at least 1, an order of {', '.join(ORDERS)}, and strata of {', '.join(STRATA)}")
    heaps: dict[str, list[tuple[float, int, int, CotOutcome]]] = defaultdict(list)
    sizes: dict[str, int] = defaultdict(int)
    doubted: set[str] = set()
    for outcome in tqdm(outcomes, desc="choosing samples", unit="sample", delay=2.0):
        if outcome.status == "direct":
            continue
        stratum = _stratum(outcome, strata)
        sizes[stratum] += 1
        asked = order == "doubt" and outcome.verdict_confidence >= 0.0
        if asked:
            doubted.add(stratum)
        doubt = abs(outcome.verdict_confidence - threshold) if asked else 2.0
        entry = (-doubt, -_draw(seed, outcome), sizes[stratum], outcome)  # the worst is at the head
        if len(heaps[stratum]) < per_stratum:
            heapq.heappush(heaps[stratum], entry)
        elif entry[:3] > heaps[stratum][0][:3]:
            heapq.heapreplace(heaps[stratum], entry)
    columns = []
    for stratum in sorted(heaps):
        best = sorted(heaps[stratum], key=lambda entry: entry[:3], reverse=True)
        how: Order = "doubt" if stratum in doubted else "random"
        columns.append([Chosen(one, stratum, how, sizes[stratum], sample_hash(one)) for *_, one in best])
    return [one for row in zip_longest(*columns) for one in row if one is not None]


def open_sample(
    out: Path, outcomes: Iterable[CotOutcome], *, per_stratum: int, order: Order = "random", strata: Sequence[str] = STRATA,
    seed: int = 0, threshold: float = THRESHOLD,
) -> list[Chosen]:  # fmt: skip
    """The list of this review: chosen at the first call and kept in `sample.json`, the same ever after.

    Other arguments at a later call change nothing and are warned of, and so are outcomes that are gone or have changed.
    """
    path = out / "review" / "sample.json"
    arguments = {"per_stratum": per_stratum, "order": order, "strata": list(strata), "seed": seed}
    if not path.exists():
        chosen = choose(outcomes, per_stratum=per_stratum, order=order, strata=strata, seed=seed, threshold=threshold)
        if not chosen:
            raise DataError(f"{out}: there is no complex sample to review; run `traceir reasoning build` first")
        _write_sample(path, arguments, chosen)
        return chosen
    kept = read_sample(out)
    if kept["arguments"] != arguments:
        _logger.warning("%s was drawn with %s and is used as it is; remove it for a fresh list", path, kept["arguments"])
    wanted = {str(one["qid"]): one for one in kept["samples"]}
    found = _find(outcomes, wanted)
    if gone := len(wanted) - len(found):
        _logger.warning("%d of %d samples in %s are no longer there and are left out", gone, len(wanted), path)
    pairs = [(one, found[qid]) for qid, one in wanted.items() if qid in found]
    chosen = [Chosen(o, one["stratum"], one["how"], kept["strata"][one["stratum"]], sample_hash(o)) for one, o in pairs]
    if changed := sum(now.sample != one["sample"] for now, (one, _) in zip(chosen, pairs, strict=True)):
        _logger.warning("%d samples have changed since they were drawn; older decisions on them are not applied", changed)
    return chosen


def read_sample(out: Path) -> dict[str, Any]:
    """`sample.json`: `arguments`, `strata` (name -> size) and `samples` (qid, task, stratum, how, sample)."""
    path = out / "review" / "sample.json"
    try:
        found = read_json(path.read_bytes())
        sizes, samples = found["strata"], found["samples"]
        whole = found["format"] == FORMAT and all(
            one["stratum"] in sizes and one["how"] in ORDERS and one["qid"] for one in samples
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read ({error}); remove it for a fresh list") from error
    if not whole:
        raise DataError(f"{path} is not a list of format {FORMAT}; remove it for a fresh list")
    return cast("dict[str, Any]", found)


def _write_sample(path: Path, arguments: Mapping[str, Any], chosen: Sequence[Chosen]) -> None:
    samples = [
        {"qid": c.outcome.case.record.qid, "task": c.outcome.case.task, "stratum": c.stratum, "how": c.how, "sample": c.sample}
        for c in chosen
    ]
    told = {"format": FORMAT, "arguments": arguments, "strata": {c.stratum: c.size for c in chosen}, "samples": samples}
    fresh = path.with_suffix(".writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}; make room on the disk, or check its rights") from error


def _stratum(outcome: CotOutcome, strata: Sequence[str]) -> str:
    parts = {"task": outcome.case.task, "status": outcome.status, "rule": outcome.rule}
    return " / ".join(parts[name] for name in strata if parts[name]) or "all"


def _draw(seed: int, outcome: CotOutcome) -> int:
    told = f"{seed} {outcome.case.task} {outcome.case.record.qid}"
    return int.from_bytes(hashlib.blake2b(told.encode("utf-8", "surrogatepass"), digest_size=16).digest())


def _find(outcomes: Iterable[CotOutcome], wanted: Iterable[str]) -> dict[str, CotOutcome]:
    """qid -> outcome; the stream is read no further than needed."""
    left = set(wanted)
    found: dict[str, CotOutcome] = {}
    for outcome in tqdm(outcomes if left else (), desc="finding samples", unit="sample", delay=2.0):
        qid = outcome.case.record.qid
        if qid in left:
            found[qid] = outcome
            left.remove(qid)
            if not left:
                break
    return found


# What follows from the decisions


def settle(out: Path, outcomes: Iterable[CotOutcome] | None = None) -> Settlement:
    """What the reviewers of a build settled. `outcomes` default to those of the build, read only if somebody decided something.

    The majority wins; on a tie the filter's own decision stands. The newest edit among those who keep gives the texts. Decisions
    on a text that has changed since are not applied; they are in `unused`, and warned of. Raises DataError for a broken line.
    """
    votes: dict[str, dict[str, Decision]] = defaultdict(dict)
    for reviewer, latest in read_decisions(out).items():
        for qid, decision in latest.items():
            votes[qid][reviewer] = decision
    found = _find(_outcomes_of(out) if outcomes is None and votes else outcomes or (), votes)
    tally = _Tally()
    for qid in sorted(votes):
        tally.count(qid, votes[qid], found.get(qid))
    if tally.unused:
        first = tally.unused[0]
        shown = f"first {first.qid} by {first.reviewer}: {first.why}"
        _logger.warning("%s: %d decisions were not applied (%s); review them again", out / "review", len(tally.unused), shown)
    return Settlement(tally.settled, tuple(tally.unused), tally.ties)


@dataclass(slots=True)
class _Tally:
    settled: dict[str, Settled] = field(default_factory=dict)
    unused: list[Unused] = field(default_factory=list)
    ties: int = 0

    def count(self, qid: str, votes: Mapping[str, Decision], outcome: CotOutcome | None) -> None:
        """Settles one sample."""
        if outcome is None:
            self.unused += [Unused(name, qid, "gone") for name in votes]
            return
        now, readable = sample_hash(outcome), bool(outcome.reasoning and outcome.answer)
        valid: dict[str, Decision] = {}
        for name, one in votes.items():
            if one.sample != now:
                self.unused.append(Unused(name, qid, "changed"))
            elif one.decision == "keep" and not readable:
                self.unused.append(Unused(name, qid, "nothing to keep"))
            else:
                valid[name] = one
        if not valid:
            return
        keeps = [one for one in valid.values() if one.choice == "keep"]
        drops = len(valid) - len(keeps)
        self.ties += len(keeps) == drops
        keep = len(keeps) > drops or (len(keeps) == drops and outcome.status == "kept")
        edits = [one for one in keeps if one.decision == "edit"] if keep else []
        edit = max(edits, key=lambda one: one.time, default=None)
        texts = (edit.reasoning, edit.answer) if edit else (outcome.reasoning, outcome.answer)
        self.settled[qid] = Settled("keep" if keep else "drop", *texts, tuple(sorted(valid)), edit is not None)


def agreement(out: Path) -> list[Agreement]:
    """Each pair of reviewers, on the samples that both judged while their text was the same; pairs without one are left out."""
    return agree(read_decisions(out))


def agree(decisions: Mapping[str, Mapping[str, Decision]]) -> list[Agreement]:
    """As `agreement`, of decisions at hand: reviewer -> qid -> decision."""
    found = []
    for first, second in combinations(sorted(decisions), 2):
        one, two = decisions[first], decisions[second]
        common = [qid for qid in one if qid in two and one[qid].sample == two[qid].sample]
        if common:
            table = {(a, b): 0 for a in ("keep", "drop") for b in ("keep", "drop")}
            for qid in common:
                table[one[qid].choice, two[qid].choice] += 1
            counts = (table["keep", "keep"], table["keep", "drop"], table["drop", "keep"], table["drop", "drop"])
            found.append(Agreement(first, second, len(common), (counts[0] + counts[3]) / len(common), *kappa(*counts)))
    return found


def kappa(both_keep: int, keep_drop: int, drop_keep: int, both_drop: int) -> tuple[float, float, float]:
    """Cohen's kappa of a two by two table, and its asymptotic 95 % interval; nan where chance alone agrees always.

    The variance is that of Fleiss, Cohen and Everitt (1969) for kappa other than 0; where all agree it is 0, however few.
    """
    n = both_keep + keep_drop + drop_keep + both_drop
    p = [[both_keep / n, keep_drop / n], [drop_keep / n, both_drop / n]]
    rows, columns = [sum(row) for row in p], [p[0][j] + p[1][j] for j in (0, 1)]
    observed, chance = p[0][0] + p[1][1], sum(rows[i] * columns[i] for i in (0, 1))
    if chance >= 1.0 - 1e-12:
        return math.nan, math.nan, math.nan
    value = (observed - chance) / (1 - chance)
    same = sum(p[i][i] * ((1 - chance) - (rows[i] + columns[i]) * (1 - observed)) ** 2 for i in (0, 1))
    other = (1 - observed) ** 2 * sum(p[i][1 - i] * (columns[i] + rows[1 - i]) ** 2 for i in (0, 1))
    variance = (same + other - (observed * chance - 2 * chance + observed) ** 2) / (n * (1 - chance) ** 4)
    reach = 1.959964 * math.sqrt(max(variance, 0.0))
    return value, max(value - reach, -1.0), min(value + reach, 1.0)


def agreement_table(out: Path) -> str:
    """The agreement of every pair of reviewers as lines of text; one sentence where there is no pair."""
    found = agreement(out)
    if not found:
        return "no two reviewers have judged the same sample yet"
    rows = [("reviewers", "n", "agreed", "kappa", "95 %")]
    for one in found:
        value, reach = ("undefined", "") if math.isnan(one.kappa) else (f"{one.kappa:.3f}", f"{one.low:.3f} to {one.high:.3f}")
        rows.append((f"{one.first}, {one.second}", str(one.n), f"{100 * one.agreed:.1f} %", value, reach))
    widths = [max(len(row[place]) for row in rows) for place in range(5)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def _outcomes_of(out: Path) -> Iterator[CotOutcome]:
    from traceir.cot import outcomes

    return outcomes.read_outcomes(out)
