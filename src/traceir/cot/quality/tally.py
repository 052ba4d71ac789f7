"""What one pass over outcomes counts of one task: funnel, lengths, openings, terms about people, copies of the target."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from traceir.cot.outcomes import CotOutcome
from traceir.cot.quality.likeness import SHORT_TARGET, Words, holds, longest_copy
from traceir.cot.quality.people_terms import GROUPS, Term, introduced
from traceir.cot.quality.sketches import Frequent, Lengths
from traceir.cot.rules import RULES, count_tokens, words_of

DROPPED_BY: Final = ("teacher", *RULES, "verifier", "reviewer")
FUNNEL: Final = ("queries", "complex", "reasoned", "passed_rules", "verified", "kept", "curated")
"""All; z = 1; with a reply; through the rules on single replies; yes with enough confidence; no duplicates; after review."""
MEASURES: Final = ("reasoning_words", "reasoning_tokens", "answer_words", "answer_tokens")
EXAMPLES: Final = 3
OPENING: Final = 4
"""Words of an opening."""
OPENINGS: Final = 20_000
COPIED: Final = 8
"""Words in a row from which a run counts as copied from the target."""
TARGETS: Final = 8
"""Positives whose texts are compared."""
BINS: Final = 20
"""Of the verifier's confidence."""
SHOWN: Final = 400
"""Characters of a text in an example."""


@dataclass(frozen=True, slots=True)
class Texts:
    """What is measured of a kept sample: its texts, and all that the data told the teacher."""

    outcome: CotOutcome
    reasoning: str
    answer: str
    captions: Mapping[str, str]

    @property
    def query(self) -> str:
        case = self.outcome.case
        return f"{case.record.text or ''}\n{self.captions.get(case.record.image_path or '', '')}\n{case.instruction}"

    @property
    def targets(self) -> list[str]:
        """The texts of the positives; [] where they are pictures alone."""
        return [one.text for one in self.outcome.case.positives if one.text]

    @property
    def target_captions(self) -> list[str]:
        found = (self.captions.get(one.image_path or "", "") for one in self.outcome.case.positives)
        return [caption for caption in found if caption]


@dataclass(slots=True)
class People:
    """Samples that hold terms which the data do not tell: by group, by term, with examples."""

    samples: int = 0
    holding: int = 0
    groups: Counter[str] = field(default_factory=Counter)
    terms: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], list[dict[str, str]]] = field(default_factory=dict)

    def add(self, qid: str, task: str, found: Mapping[Term, str]) -> None:
        self.samples += 1
        self.holding += bool(found)
        self.groups.update({term.group for term in found})
        for term, words in found.items():
            key = (term.group, term.name)
            self.terms[key] += 1
            _keep(self.examples, key, {"qid": qid, "task": task, "words": words[:SHOWN]})

    def absorb(self, other: People) -> None:
        self.samples += other.samples
        self.holding += other.holding
        self.groups.update(other.groups)
        self.terms.update(other.terms)
        _absorb(self.examples, other.examples)

    def summary(self) -> dict[str, Any]:
        groups: dict[str, Any] = {}
        for group in GROUPS:
            terms = sorted(
                ((name, count) for (own, name), count in self.terms.items() if own == group), key=lambda t: (-t[1], t[0])
            )
            if terms:
                told = [{"term": name, "samples": n, "examples": self.examples[group, name]} for name, n in terms]
                groups[group] = {"samples": self.groups[group], "terms": told}
        share = round(self.holding / self.samples, 4) if self.samples else 0.0
        return {"samples": self.samples, "holding": self.holding, "share": share, "groups": groups}


@dataclass(slots=True)
class Tally:
    """Counters of one task, or of all; memory does not grow with samples but for 8 bytes a kept one."""

    funnel: Counter[str] = field(default_factory=Counter)
    rules: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, str]]] = field(default_factory=dict)
    lengths: dict[str, Lengths] = field(default_factory=lambda: {name: Lengths() for name in MEASURES})
    openings: Frequent = field(default_factory=lambda: Frequent(OPENINGS))
    digests: array[int] = field(default_factory=lambda: array("Q"))
    told: People = field(default_factory=People)
    untold: People = field(default_factory=People)
    copies: Lengths = field(default_factory=Lengths)
    copied: Counter[str] = field(default_factory=Counter)
    copy_examples: list[dict[str, str]] = field(default_factory=list)
    confidence: dict[str, list[int]] = field(default_factory=lambda: {"yes": [0] * BINS, "no": [0] * BINS})
    made_by: dict[str, Counter[str]] = field(
        default_factory=lambda: {"teacher": Counter(), "verifier": Counter(), "prompts": Counter()}
    )
    tokens: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: CotOutcome, curated: bool, reviewed: bool) -> None:
        """Counts any outcome; `curated`: it is in the data after review, `reviewed`: people have settled it."""
        self.funnel.update(_reached(outcome))
        self.funnel["curated"] += curated
        rule = "reviewer" if reviewed and not curated else outcome.rule
        if outcome.status != "direct" and not curated:
            self.rules[rule] += 1
            text = outcome.raw or outcome.reasoning
            example = {"qid": outcome.case.record.qid, "detail": outcome.detail[:SHOWN], "text": text[:SHOWN]}
            _keep(self.examples, rule, example | {"task": outcome.case.task})
        if outcome.verdict is not None and outcome.verdict_confidence >= 0.0 and outcome.rule != "teacher":
            place = min(int(outcome.verdict_confidence * BINS + 1e-9), BINS - 1)
            self.confidence["yes" if outcome.verdict else "no"][place] += 1
        made = json.loads(outcome.provenance or "{}")
        for name, counts in self.made_by.items():
            if made.get(name):
                counts[str(made[name])] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            self.tokens[name] += int(made.get(name, 0))

    def add_kept(self, texts: Texts, tokenizer: str) -> Words:
        """Counts what a kept sample says; returns the words of its reasoning."""
        reasoning, answer = words_of(texts.reasoning), words_of(texts.answer)
        sizes = (len(reasoning), count_tokens(texts.reasoning, tokenizer), len(answer), count_tokens(texts.answer, tokenizer))
        for name, size in zip(MEASURES, sizes, strict=True):
            self.lengths[name].add(size)
        self.openings.add(" ".join(reasoning[:OPENING]))
        plain = " ".join(reasoning).encode("utf-8", "surrogatepass")
        self.digests.append(int.from_bytes(hashlib.blake2b(plain, digest_size=8).digest()))
        record, targets, query = texts.outcome.case.record, texts.targets, texts.query
        known = [*targets, *texts.target_captions]
        found = introduced(f"{texts.reasoning}\n{texts.answer}", "\n".join([query, *known]))
        (self.told if known else self.untold).add(record.qid, texts.outcome.case.task, found)
        if targets:
            self._count_copy([reasoning, answer], [words_of(text) for text in targets[:TARGETS]], words_of(query), texts)
        return reasoning

    def _count_copy(self, said: list[Words], targets: list[Words], query: Words, texts: Texts) -> None:
        run = max((longest_copy(said, target, [query]) for target in targets), key=len)
        whole = next((t for t in targets if SHORT_TARGET <= len(t) < COPIED and holds(said, t) and not holds([query], t)), None)
        self.copies.add(len(run))
        self.copied["run"] += len(run) >= COPIED
        self.copied["whole"] += whole is not None
        if len(run) >= COPIED or whole is not None:
            self.copied["either"] += 1
            if len(self.copy_examples) < EXAMPLES:
                case, shown = texts.outcome.case, run if len(run) >= COPIED or whole is None else whole
                self.copy_examples.append({"qid": case.record.qid, "task": case.task, "copied": " ".join(shown)[:SHOWN]})

    def absorb(self, other: Tally) -> None:
        """Adds the counts of another task."""
        for own, more in ((self.funnel, other.funnel), (self.rules, other.rules), (self.copied, other.copied)):
            own.update(more)
        self.tokens.update(other.tokens)
        _absorb(self.examples, other.examples)
        for name, lengths in self.lengths.items():
            lengths.absorb(other.lengths[name])
        self.openings.absorb(other.openings)
        self.digests.extend(other.digests)
        self.told.absorb(other.told)
        self.untold.absorb(other.untold)
        self.copies.absorb(other.copies)
        self.copy_examples = (self.copy_examples + other.copy_examples)[:EXAMPLES]
        for name, counts in self.confidence.items():
            self.confidence[name] = [one + more for one, more in zip(counts, other.confidence[name], strict=True)]
        for name, found in self.made_by.items():
            found.update(other.made_by[name])

    def exact(self) -> dict[str, Any]:
        """Reasonings whose words another, earlier one has too."""
        count = len(self.digests)
        surplus = count - len(np.unique(np.frombuffer(self.digests, dtype=np.uint64))) if count else 0
        return {"samples": count, "surplus": surplus, "share": round(surplus / count, 4) if count else 0.0}


def _reached(outcome: CotOutcome) -> list[str]:
    """The stages of the funnel that a sample came through; people aside."""
    reached = ["queries"]
    if outcome.z and outcome.status != "direct":
        reached.append("complex")
        if outcome.rule != "teacher" or outcome.verdict is not None:
            reached.append("reasoned")
            if outcome.rule not in RULES or outcome.rule == "duplicate":
                reached.append("passed_rules")
                if outcome.rule in ("", "duplicate"):
                    reached.append("verified")
                    reached += ["kept"] * (outcome.status == "kept")
    return reached


def _keep(examples: dict[Any, list[dict[str, str]]], key: Any, example: dict[str, str]) -> None:
    kept = examples.setdefault(key, [])
    if len(kept) < EXAMPLES:
        kept.append(example)


def _absorb(examples: dict[Any, list[dict[str, str]]], others: Mapping[Any, list[dict[str, str]]]) -> None:
    for key, found in others.items():
        for example in found:
            _keep(examples, key, example)
