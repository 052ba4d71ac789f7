"""The rule filter of M-BEIR-CoT: what a reply must be to be kept (paper, section 3), and the name of the rule that it breaks.

Rules are pure functions of a reply and its case, tried in the order of `RULES`; the first that is broken drops the sample.
`duplicate` needs the samples before it and is decided where they are read in order (outcomes.py).
"""

from __future__ import annotations

import hashlib
import re
import tomllib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Final

from traceir.cot.ask import TEMPLATES, CotCase, spoken
from traceir.errors import DataError

FORM: Final = ("refusal", "truncated", "tags", "order", "nesting", "outside")
"""The rules that look at the reply alone."""
CONTENT: Final = ("prompt_leak", "reasoning_length", "answer_length", "repetition", "language", "keyword", "source_copy")
RULES: Final = (*FORM, *CONTENT, "duplicate")
"""In the order in which they are tried."""
TAG_NAMES: Final = ("reasoning", "answer")
_TAG: Final = re.compile(r"</?(?:reasoning|answer)>", re.IGNORECASE)
_ORDERED: Final = re.compile(r"<reasoning>(.*?)</reasoning>(.*?)<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_TOKEN: Final = re.compile(r"\w+|[^\w\s]")
_WORD: Final = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_WORDS: Final = tomllib.loads((Path(__file__).parent / "rules.toml").read_text(encoding="utf-8"))
_REFUSAL: Final = re.compile("|".join(_WORDS["refusals"]), re.IGNORECASE)
STOP_WORDS: Final = frozenset(_WORDS["stop_words"].split())
"""Words that say nothing of a target."""


@dataclass(frozen=True, slots=True)
class RuleLimits:
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


@dataclass(frozen=True)
class RuleFilter:
    """The rules with their limits. `captions`: image path -> what it shows (source.read_captions)."""

    limits: RuleLimits = field(default_factory=RuleLimits)
    captions: Mapping[str, str] = field(default_factory=dict, repr=False)
    templates: Mapping[str, str] = field(default_factory=dict, repr=False)

    def check(self, case: CotCase, raw: str, finish: str = "stop") -> Checked:
        """The reply's texts, and the first rule it breaks. Pure: equal arguments give equal results.

        What is checked is what the reply says after the thoughts that some models write first (ask.spoken).
        """
        raw = spoken(raw, finish)
        match = _ORDERED.search(raw)
        reasoning, answer = (_TAG.sub(" ", match[group]).strip() if match else "" for group in (1, 3))
        problems = zip(RULES, chain(_form(raw, finish, match), self._content(case, reasoning, answer)), strict=False)
        rule, detail = next(((rule, detail) for rule, detail in problems if detail), ("", ""))
        return Checked(reasoning, answer, rule, detail)

    def _content(self, case: CotCase, reasoning: str, answer: str) -> Iterator[str]:
        """What is wrong by each rule on the texts, in their order, "" where nothing is."""
        limits, texts = self.limits, (reasoning, answer)
        yield self._leak(texts)
        yield self._length(reasoning, limits.reasoning_least, limits.reasoning_most)
        yield self._length(answer, limits.answer_least, limits.answer_most)
        yield self._repetition(reasoning) or self._repetition(answer)
        yield self._language(" ".join(texts))
        words, known = salient(answer), salient(case.record.text or "")
        for candidate in case.positives:
            known |= salient(candidate.text or "") | salient(self.captions.get(candidate.image_path or "", ""))
        shown = ", ".join(sorted(words)[:8]) or "no salient word"
        yield "" if words & known else f"none of {shown} is in query or target"
        source = self.captions.get(case.record.image_path or "", "") if case.strategy == "composed" else ""
        yield f"the answer is the source's caption, {source!r}" if source and plain(source) == plain(answer) else ""

    def _leak(self, texts: Iterable[str]) -> str:
        size = self.limits.leaked + 1
        prompt = _prompt_runs(tuple(sorted((dict(TEMPLATES) | dict(self.templates)).items())), size)
        leaked = next((run for text in texts for run in runs_of(words_of(text), size) if run in prompt), ())
        return f"{' '.join(leaked)!r} is in the prompt" if leaked else ""

    def _length(self, text: str, least: int, most: int) -> str:
        count = count_tokens(text, self.limits.tokenizer)
        return "" if least <= count <= most else f"{count} tokens; from {least} to {most} are wanted"

    def _repetition(self, text: str) -> str:
        words, most = words_of(text), self.limits.repeated
        for size in range(1, len(words) // (most + 1) + 1):
            run = 0
            for position in range(size, len(words)):
                run = run + 1 if words[position] == words[position - size] else 0
                if run >= size * most:
                    return f"{' '.join(words[position - size + 1 : position + 1])!r} follows itself more than {most} times"
        grams = Counter(runs_of(words, 4))
        share = (grams.total() - len(grams)) / grams.total() if grams.total() >= 40 else 0.0
        return f"{share:.0%} of its 4-grams occurred before" if share > self.limits.repeats else ""

    def _language(self, text: str) -> str:
        letters = [letter for letter in text if letter.isalpha()]
        strange = sum(1 for letter in letters if not unicodedata.name(letter, "").startswith("LATIN"))
        if letters and strange > len(letters) / 10:
            return f"{strange} of {len(letters)} letters are not Latin"
        language, probability = _detector().classify(text.lower())
        return f"{language} at {probability:.2f}" if language != "en" and probability > self.limits.foreign else ""


def _form(raw: str, finish: str, match: re.Match[str] | None) -> Iterator[str]:
    """What is wrong by each rule of FORM, in their order, "" where nothing is; those after `tags` rely on it."""
    refused = _REFUSAL.search(raw)
    filtered = "the teacher's content filter stopped it" if finish == "content_filter" else ""
    yield filtered or (f"{refused[0]!r}" if refused else "")
    yield "it reached the limit of tokens" if finish == "length" else ""
    tags = Counter(tag.lower() for tag in _TAG.findall(raw))
    counts = {name: (tags[f"<{name}>"], tags[f"</{name}>"]) for name in TAG_NAMES}
    wrong = (
        f"{n} of <{name}>, {ends} of </{name}>; one of each is wanted"
        for name, (n, ends) in counts.items()
        if (n, ends) != (1, 1)
    )
    yield next(wrong, "")
    low = raw.lower()
    spans = sorted((low.index(f"<{name}>"), low.index(f"</{name}>")) for name in TAG_NAMES)
    nested = any(start > end for start, end in spans) or spans[1][0] < spans[0][1]
    yield "the answer comes first" if not nested and low.index("<answer>") < low.index("<reasoning>") else ""
    yield "the tags are within each other" if nested else ""
    outside = (raw[: match.start()] + match[2] + raw[match.end() :]).strip() if match else ""
    yield f"{outside[:80]!r} is outside the tags" if outside else ""


def duplicate_key(case: CotCase, answer: str) -> bytes:
    """16 bytes that are equal for near-duplicate (query, answer) pairs of a task: case and punctuation do not count.

    The image is part of the query: the same words about another image are another query.
    """
    record = case.record
    parts = "\x00".join((case.task, plain(record.text or ""), record.image_path or "", plain(answer)))
    return hashlib.blake2b(parts.encode(), digest_size=16).digest()


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
    words = [word.removesuffix("'s").removesuffix("’s") for word in words_of(text) if word not in STOP_WORDS]
    return {word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words}


def runs_of(words: Sequence[str], size: int) -> Iterator[tuple[str, ...]]:
    """All runs of so many words."""
    return zip(*(words[first:] for first in range(size)), strict=False)


@cache
def _prompt_runs(templates: tuple[tuple[str, str], ...], size: int) -> frozenset[tuple[str, ...]]:
    """All runs of `size` words in the templates, names and texts as of ask.TEMPLATES."""
    return frozenset(run for _, text in templates for run in runs_of(words_of(text), size))


@cache
def _detector() -> Any:
    """Tells the language of a text and its probability; deterministic and offline."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise DataError("the language rule needs the package py3langid; pip install 'traceir[reasoning]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


@cache
def _load_tokenizer(path: str) -> Any:
    from tokenizers import Tokenizer

    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise DataError(f"{file} is not there; name a tokenizer.json or the folder it is in")
    return Tokenizer.from_file(str(file))
