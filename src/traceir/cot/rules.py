"""The rule filter of M-BEIR-CoT: what a reply must be to be kept (paper, section 3), and the name of the rule that it breaks.

Rules are pure functions of a reply and its case, tried in the order of `RULES`; the first that is broken drops the sample.
`duplicate` needs the samples before it and is decided where they are read in order (outcomes.py).
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from traceir.cot.ask import TEMPLATES, Case
from traceir.cot.replies import spoken
from traceir.errors import DataError

RULES: Final = (
    "refusal",
    "truncated",
    "tags",
    "order",
    "nesting",
    "outside",
    "prompt_leak",
    "reasoning_length",
    "answer_length",
    "repetition",
    "language",
    "keyword",
    "source_copy",
    "duplicate",
)
"""In the order in which they are tried."""

TAG_NAMES: Final = ("reasoning", "answer")
_TAG: Final = re.compile(r"</?(?:reasoning|answer)>", re.IGNORECASE)
_ORDERED: Final = re.compile(r"<reasoning>(.*?)</reasoning>(.*?)<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_TOKEN: Final = re.compile(r"\w+|[^\w\s]")
_WORD: Final = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_REFUSAL: Final = re.compile(
    r"\b(?:i['’]?m|i am) (?:sorry|unable|not able|not allowed)\b"
    r"|\bi (?:cannot|can['’]?t|can not|won['’]?t|am unable to|must decline)\b"
    r"|\bi (?:do not|don['’]t) (?:feel|have (?:access|the ability|enough information))"
    r"|\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b"
    r"|\bunable to (?:assist|comply|help|identify|provide|see|view)\b"
    r"|\b(?:against|violates?) (?:my|our|the) (?:guidelines|policy|policies)\b"
    r"|\bhappy to help\b|\bi hope this helps\b|\blet me know if\b",
    re.IGNORECASE,
)
STOP_WORDS: Final = frozenset(
    """
    a about above after again all also an and any are as at be because been before being below between both but by can
    could did do does doing down during each few find for from further get give had has have having he her here hers him
    his how i if in into is it its just like made make me more most my no nor not now of off on once one only or other our
    out over own same she should show so some such than that the their them then there these they thing this those through
    to too under until up very was we were what when where which while who whom whose why will with would you your picture
    image photo describe description target answer query question
    """.split()
)
"""Words that say nothing of a target."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The numbers of the rules; the defaults are the paper's where it gives one.

    Tokens are those of `tokenizer` (a `tokenizer.json` or its folder, best the teacher's own), else words and punctuation marks.
    `repeated`: a phrase may follow itself so many times; `repeats`: greatest share of 4-grams of words that occurred before.
    `leaked`: words in a row that a reply may share with the teacher's prompt. `foreign`: probability at which another language
    drops, letters of another script beyond a tenth always do.
    """

    reasoning_least: int = 16
    reasoning_most: int = 256
    answer_least: int = 2
    answer_most: int = 64
    repeated: int = 4
    repeats: float = 0.6
    leaked: int = 7
    foreign: float = 0.9
    tokenizer: str = ""


@dataclass(frozen=True, slots=True)
class Checked:
    """A reply after the rules. `rule` is "" where none is broken; the texts are without tags, "" where they could not be read."""

    reasoning: str
    answer: str
    rule: str = ""
    detail: str = ""

    @property
    def formless(self) -> bool:
        """Whether it has not the form that was asked for, whatever it says."""
        return self.rule in _OF_REPLY


@dataclass(frozen=True)
class RuleFilter:
    """The rules with their limits. `captions`: picture path -> what it shows (source.read_captions)."""

    limits: Limits = field(default_factory=Limits)
    captions: Mapping[str, str] = field(default_factory=dict, repr=False)
    templates: Mapping[str, str] = field(default_factory=dict, repr=False)

    def check(self, case: Case, raw: str, finish: str = "stop") -> Checked:
        """The reply's texts, and the first rule it breaks. Pure: equal arguments give equal results.

        What is checked is what the reply says after the thoughts that some models write first (replies.spoken).
        """
        raw = spoken(raw, finish)
        reasoning, answer = _texts(raw)
        for rule, broken in _OF_REPLY.items():
            if detail := broken(raw, finish):
                return Checked(reasoning, answer, rule, detail)
        for rule, found in (
            ("prompt_leak", self._leak(reasoning, answer)),
            ("reasoning_length", self._length(reasoning, self.limits.reasoning_least, self.limits.reasoning_most)),
            ("answer_length", self._length(answer, self.limits.answer_least, self.limits.answer_most)),
            ("repetition", self._repetition(reasoning) or self._repetition(answer)),
            ("language", self._language(f"{reasoning} {answer}")),
            ("keyword", self._keyword(case, answer)),
            ("source_copy", self._source_copy(case, answer)),
        ):
            if found:
                return Checked(reasoning, answer, rule, found)
        return Checked(reasoning, answer)

    def _length(self, text: str, least: int, most: int) -> str:
        count = count_tokens(text, self.limits.tokenizer)
        return "" if least <= count <= most else f"{count} tokens; from {least} to {most} are wanted"

    def _leak(self, reasoning: str, answer: str) -> str:
        size = self.limits.leaked + 1
        told = prompt_phrases(tuple(sorted((dict(TEMPLATES) | dict(self.templates)).items())), size)
        for text in (reasoning, answer):
            words = words_of(text)
            for first in range(len(words) - size + 1):
                if tuple(words[first : first + size]) in told:
                    return f"{' '.join(words[first : first + size])!r} is in the prompt"
        return ""

    def _repetition(self, text: str) -> str:
        words = words_of(text)
        for size in range(1, len(words) // (self.limits.repeated + 1) + 1):
            run = 0
            for place in range(size, len(words)):
                run = run + 1 if words[place] == words[place - size] else 0
                if run >= size * self.limits.repeated:
                    phrase = " ".join(words[place - size + 1 : place + 1])
                    return f"{phrase!r} follows itself more than {self.limits.repeated} times"
        grams = Counter(zip(*(words[offset:] for offset in range(4)), strict=False))
        total = sum(grams.values())
        share = (total - len(grams)) / total if total >= 40 else 0.0
        return f"{share:.0%} of its 4-grams occurred before" if share > self.limits.repeats else ""

    def _language(self, text: str) -> str:
        letters = [letter for letter in text if letter.isalpha()]
        strange = sum(1 for letter in letters if not unicodedata.name(letter, "").startswith("LATIN"))
        if letters and strange > len(letters) / 10:
            return f"{strange} of {len(letters)} letters are not Latin"
        language, probability = detector()(text.lower())
        return f"{language} at {probability:.2f}" if language != "en" and probability > self.limits.foreign else ""

    def _keyword(self, case: Case, answer: str) -> str:
        known = salient(case.record.text or "")
        for candidate in case.positives:
            known |= salient(candidate.text or "") | salient(self.captions.get(candidate.image_path or "", ""))
        words = salient(answer)
        return "" if words & known else f"none of {', '.join(sorted(words)[:8]) or 'no salient word'} is in query or target"

    def _source_copy(self, case: Case, answer: str) -> str:
        if case.family != "composed":
            return ""
        caption = self.captions.get(case.record.image_path or "", "")
        return f"the answer is the source's caption, {caption!r}" if caption and plain(caption) == plain(answer) else ""


def duplicate_key(case: Case, answer: str) -> bytes:
    """16 bytes that are equal for near-duplicate (query, answer) pairs of a task: case and punctuation do not count.

    The picture is part of the query: the same words about another picture are another query.
    """
    record = case.record
    told = "\x00".join((case.task, plain(record.text or ""), record.image_path or "", plain(answer)))
    return hashlib.blake2b(told.encode(), digest_size=16).digest()


def count_tokens(text: str, tokenizer: str = "") -> int:
    """Tokens of a text: of a tokenizer where one is named, else words and punctuation marks."""
    if tokenizer:
        return len(_load_tokenizer(tokenizer).encode(text, add_special_tokens=False).ids)
    return len(_TOKEN.findall(text))


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return [word.lower() for word in _WORD.findall(text)]


def plain(text: str) -> str:
    """A text as near duplicates are compared: lower case, words alone, one blank between them."""
    return " ".join(words_of(text))


def salient(text: str) -> set[str]:
    """The words of a text that can tell a target, without plural and possessive endings."""
    return {_stem(word) for word in words_of(text) if word not in STOP_WORDS}


@cache
def prompt_phrases(templates: tuple[tuple[str, str], ...], size: int) -> frozenset[tuple[str, ...]]:
    """All runs of `size` words in the templates, names and texts as of ask.TEMPLATES."""
    found: set[tuple[str, ...]] = set()
    for _, text in templates:
        words = words_of(text)
        found.update(tuple(words[first : first + size]) for first in range(len(words) - size + 1))
    return frozenset(found)


@cache
def detector() -> Callable[[str], tuple[str, float]]:
    """The language of a text and its probability, by py3langid; deterministic and offline."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError("the language rule needs the package py3langid; pip install 'traceir[reasoning]'") from error
    known: Any = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)

    def classify(text: str) -> tuple[str, float]:
        language, probability = known.classify(text)
        return str(language), float(probability)

    return classify


@cache
def _load_tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(f"{file} is not there; name a tokenizer.json or the folder it is in")
    return Tokenizer.from_file(str(file))


def _texts(raw: str) -> tuple[str, str]:
    match = _ORDERED.search(raw)
    if match is None:
        return "", ""
    return _TAG.sub(" ", match[1]).strip(), _TAG.sub(" ", match[3]).strip()


def _stem(word: str) -> str:
    word = word.removesuffix("'s").removesuffix("’s")
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word


def _refusal(raw: str, finish: str) -> str:
    if finish == "content_filter":
        return "the teacher's content filter stopped it"
    match = _REFUSAL.search(raw)
    return f"{match[0]!r}" if match else ""


def _truncated(raw: str, finish: str) -> str:
    return "it reached the limit of tokens" if finish == "length" else ""


def _tags(raw: str, finish: str) -> str:
    found = Counter(tag.lower() for tag in _TAG.findall(raw))
    for name in TAG_NAMES:
        if (opened := found[f"<{name}>"]) != 1 or found[f"</{name}>"] != 1:
            return f"{opened} of <{name}>, {found[f'</{name}>']} of </{name}>; one of each is wanted"
    return ""


def _order(raw: str, finish: str) -> str:
    low = raw.lower()
    return "the answer comes first" if low.index("<answer>") < low.index("<reasoning>") and not _nested(low) else ""


def _nesting(raw: str, finish: str) -> str:
    return "the tags are within each other" if _nested(raw.lower()) else ""


def _nested(low: str) -> bool:
    spans = sorted((low.index(f"<{name}>"), low.index(f"</{name}>")) for name in TAG_NAMES)
    return any(start > end for start, end in spans) or spans[1][0] < spans[0][1]


def _outside(raw: str, finish: str) -> str:
    match = _ORDERED.search(raw)
    outside = (raw[: match.start()] + match[2] + raw[match.end() :]).strip() if match else ""
    return f"{outside[:80]!r} is outside the tags" if outside else ""


_OF_REPLY: Final[Mapping[str, Callable[[str, str], str]]] = {
    "refusal": _refusal,
    "truncated": _truncated,
    "tags": _tags,
    "order": _order,
    "nesting": _nesting,
    "outside": _outside,
}
"""The rules that look at the reply alone; each says what is wrong, "" where nothing is. Those after `tags` may rely on it."""
