"""Faults on demand for the scripted teacher, decided by the content of a question alone, so that a resumed run sees the same."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType
from typing import Final

from traceir.cot.ask import TEMPLATES, Stage
from traceir.cot.rules import plain
from traceir.cot.scripted.oracle import Asked, Entry, Oracle, well_formed
from traceir.errors import InputError

MEANT: Final[Mapping[str, str]] = MappingProxyType(
    {
        "refusal": "refusal",
        "truncated": "truncated",
        "missing_tag": "tags",
        "doubled_tag": "tags",
        "swapped": "order",
        "nested": "nesting",
        "text_before": "outside",
        "text_after": "outside",
        "prompt_leak": "prompt_leak",
        "too_short": "reasoning_length",
        "too_long": "reasoning_length",
        "answer_short": "answer_length",
        "answer_long": "answer_length",
        "loop": "repetition",
        "wrong_language": "language",
        "source_copy": "source_copy",
        "hallucination": "verifier",
        "bad_json": "teacher",
    }
)
"""Fault of a reply -> what is meant to drop it: one of rules.RULES, `verifier`, or `teacher` (a reply that cannot be read)."""

CONTENT: Final = tuple(kind for kind in MEANT if kind != "bad_json")
"""Faults of replies that write reasoning."""
UNREADABLE: Final = ("bad_json",)
"""Faults of the other replies."""
TRANSPORT: Final = ("rate_limit", "server_error", "stall", "cut")
"""Faults of the connection, at any stage: status 429, status 500, a reply that never comes, one that breaks off."""
ALL: Final = (*CONTENT, *UNREADABLE, *TRANSPORT)


@dataclass(frozen=True, slots=True)
class Faults:
    """Which questions meet a fault: a share of `rate`, drawn by `seed`.

    Of the questions for reasoning, `rate` get a fault of content, and of the rest `rate` one of transport; of all other questions
    `rate` get one of transport or an unreadable reply. Kinds have equal shares. Raises InputError for a bad rate or kind.
    """

    rate: float
    seed: int = 0
    kinds: Collection[str] = ALL

    def __post_init__(self) -> None:
        if not 0.0 <= self.rate <= 1.0:
            raise InputError(f"the rate of faults is {self.rate}; it must be from 0 to 1")
        if unknown := sorted(set(self.kinds) - set(ALL)):
            raise InputError(f"fault {unknown[0]!r} is unknown; the faults are {', '.join(ALL)}")

    def fault_of(self, digest: str, stage: Stage, barred: Collection[str] = ()) -> str | None:
        """The fault of a question by the digest of its content; None for most. `barred` kinds cannot be shown by its reply."""
        draws = _draws(f"{self.seed}:{digest}")
        groups = (CONTENT, TRANSPORT) if stage == "reason" else ((*UNREADABLE, *TRANSPORT),)
        for group in groups:
            left = [kind for kind in group if kind in self.kinds and kind not in barred]
            met, kind_draw = next(draws) < self.rate, next(draws)
            if met and left:
                return left[int(kind_draw * len(left))]
        return None


def barred_for(asked: Asked, oracle: Oracle) -> tuple[str, ...]:
    """The faults that the reply to this question cannot show: no picture to copy from, no other answer to mistake it for."""
    if asked.stage != "reason":
        return ()
    source, answer = plain(asked.entry.source), plain(asked.entry.answer)
    copied = () if len(source.split()) > 1 and source != answer else ("source_copy",)
    return copied if oracle.other(asked.entry, 0) else (*copied, "hallucination")


def spoil(kind: str, asked: Asked, oracle: Oracle) -> tuple[str, str]:
    """The spoilt reply and its finish reason, equal for equal questions. `kind`: of CONTENT or UNREADABLE."""
    draw = random.Random(int(asked.digest, 16))
    if kind == "bad_json":
        return draw.choice(_NO_JSON[asked.stage]), "stop"
    if kind == "truncated":
        whole = well_formed(asked.entry.reasoning, asked.entry.answer)
        return whole[: int(len(whole) * draw.uniform(0.3, 0.85))], "length"
    if kind == "hallucination":
        mistaken = oracle.other(asked.entry, draw.getrandbits(32)) or asked.entry
        return well_formed(mistaken.reasoning, mistaken.answer), "stop"
    if kind == "prompt_leak":
        return well_formed(f"{_leaked(asked, draw)} {asked.entry.reasoning}", asked.entry.answer), "stop"
    return _SPOIL[kind](asked.entry, draw), "stop"


def _draws(told: str) -> Iterator[float]:
    """Eight numbers from 0 to below 1."""
    digest = hashlib.sha256(told.encode()).digest()
    return (int.from_bytes(digest[place : place + 4], "big") / 2**32 for place in range(0, 32, 4))


def _leaked(asked: Asked, draw: random.Random) -> str:
    """A sentence of the system prompt, of at least nine words and without tags."""
    for told in (asked.system, TEMPLATES["reason"]):
        sentences = [one.strip() for one in re.split(r"(?<=[.:])\s", told)]
        if long := [one for one in sentences if len(one.split()) > 8 and "<" not in one and "{" not in one]:
            return draw.choice(long)
    return ""


def _refusal(entry: Entry, draw: random.Random) -> str:
    told = draw.choice(_REFUSALS)
    if draw.random() < 0.75:
        return told
    return well_formed(f"{told} What the picture shows cannot be told from what was sent with this request.", "no answer")


def _missing_tag(entry: Entry, draw: random.Random) -> str:
    tag = draw.choice(("<reasoning>", "</reasoning>", "<answer>", "</answer>"))
    return well_formed(entry.reasoning, entry.answer).replace(tag, "", 1)


def _doubled_tag(entry: Entry, draw: random.Random) -> str:
    whole = well_formed(entry.reasoning, entry.answer)
    tag = draw.choice(("<reasoning>", "</reasoning>", "<answer>", "</answer>", ""))
    return whole.replace(tag, tag * 2, 1) if tag else f"{whole}<answer>{entry.answer}</answer>"


def _swapped(entry: Entry, draw: random.Random) -> str:
    return f"<answer>{entry.answer}</answer><reasoning>{entry.reasoning}</reasoning>"


def _nested(entry: Entry, draw: random.Random) -> str:
    return draw.choice(
        (
            f"<reasoning>{entry.reasoning}<answer>{entry.answer}</answer></reasoning>",
            f"<reasoning>{entry.reasoning}<answer></reasoning>{entry.answer}</answer>",
            f"<answer><reasoning>{entry.reasoning}</reasoning>{entry.answer}</answer>",
        )
    )


def _text_before(entry: Entry, draw: random.Random) -> str:
    return draw.choice(_BEFORE) + well_formed(entry.reasoning, entry.answer)


def _text_after(entry: Entry, draw: random.Random) -> str:
    return well_formed(entry.reasoning, entry.answer) + draw.choice(_AFTER)


def _too_short(entry: Entry, draw: random.Random) -> str:
    return well_formed(draw.choice(("As shown.", "See above.", "Obvious.", "Easy.")), entry.answer)


def _too_long(entry: Entry, draw: random.Random) -> str:
    """Some 400 words and more."""
    count = draw.randrange(20, 30)
    steps = (f"In step {number} every part seen so far is looked at again and compared with part {number}, which stays"
             for number in range(1, count))  # fmt: skip
    return well_formed(f"{entry.reasoning}; {'; '.join(steps)}", entry.answer)


def _answer_short(entry: Entry, draw: random.Random) -> str:
    return well_formed(entry.reasoning, draw.choice(("it", "this", "one", "yes", "that")))


def _answer_long(entry: Entry, draw: random.Random) -> str:
    """At least 90 words."""
    things = [f"a {colour} {shape}" for colour, shape in product(_COLOURS, _SHAPES)]
    return well_formed(entry.reasoning, f"{entry.answer}, which is not {', not '.join(draw.sample(things, 24))}")


def _loop(entry: Entry, draw: random.Random) -> str:
    """A phrase of at most six words, ten times and more, after the first words of the reasoning."""
    words = entry.reasoning.split()
    clause = " ".join(re.split(r"[.;]", entry.reasoning)[-1].split()[:6])
    phrase = draw.choice((*_PHRASES, clause or _PHRASES[0]))
    return well_formed(f"{' '.join(words[:12])}; {'; '.join([phrase] * draw.randrange(10, 14))}", entry.answer)


def _wrong_language(entry: Entry, draw: random.Random) -> str:
    """Reasoning of at least 15 words, or 40 signs, and mostly an answer, in a language that is not English."""
    first, second, third, answer = (draw.choice(part) for part in draw.choice(_LANGUAGES))
    return well_formed(first + second + third, answer or entry.answer)


def _source_copy(entry: Entry, draw: random.Random) -> str:
    return well_formed(entry.reasoning, entry.source)


_SPOIL: Final[Mapping[str, Callable[[Entry, random.Random], str]]] = MappingProxyType(
    {
        "refusal": _refusal,
        "missing_tag": _missing_tag,
        "doubled_tag": _doubled_tag,
        "swapped": _swapped,
        "nested": _nested,
        "text_before": _text_before,
        "text_after": _text_after,
        "too_short": _too_short,
        "too_long": _too_long,
        "answer_short": _answer_short,
        "answer_long": _answer_long,
        "loop": _loop,
        "wrong_language": _wrong_language,
        "source_copy": _source_copy,
    }
)

_REFUSALS: Final = (
    "I'm sorry, but I can't help with this request.",
    "I’m sorry, but I can’t describe what is in this picture.",
    "I am sorry, I am unable to identify what is shown.",
    "As an AI language model, I have no eyes and see no pictures.",
    "As a large language model I must leave this request without an answer.",
    "I cannot assist with describing this content.",
    "Unfortunately I am not able to view the picture that was attached.",
    "I won't write about this picture, because it goes against my guidelines.",
)
_BEFORE: Final = (
    "Sure! Here is the reasoning that was asked for:\n",
    "Certainly. ",
    "**Reasoning and answer**\n\n",
    "```xml\n",
    "Okay, first I look at the picture. ",
)
_AFTER: Final = (
    "\n\nNote: the picture is small, so a detail may differ.",
    "\n```",
    " I am confident in this description.",
    "\nConfidence: 0.95",
)
_PHRASES: Final = (
    "so it is the same one",
    "wait, look at it again",
    "and then the next one",
    "the one on the left",
)
_COLOURS: Final = ("red", "green", "blue", "yellow", "white", "black")
_SHAPES: Final = ("lamp", "boat", "tree", "chair", "kite", "door")
_NO_JSON: Final[Mapping[Stage, tuple[str, ...]]] = MappingProxyType(
    {
        "assess": (
            "I would call this query complex.",
            '{"complex": true, "reason": "the change is',
            '{"complex": "maybe", "reason": "hard to tell", "confidence": 0.8}',
            "complex: yes\nconfidence: 0.9",
            '{"z": 1}',
        ),
        "verify": (
            "Yes, that fits the picture.",
            '{"verdict": "yes", "confid',
            '{"verdict": "yes", "confidence": "high", "reason": "it fits"}',
            "verdict: yes\nconfidence: 0.9",
            '{"verdict": "perhaps", "confidence": 0.8}',
        ),
    }
)

_LANGUAGES: Final = (
    (  # German
        (
            "Auf dem Bild sieht man einen kleinen roten Würfel und eine Kugel",
            "Das Foto zeigt eine lange grüne Jacke mit Streifen",
        ),
        (", und daneben liegen noch zwei weitere Dinge auf dem Tisch", ", und im Hintergrund steht ein großes Haus am Fluss"),
        (". Deshalb muss das gesuchte Bild eine andere Farbe haben.", ". Alles andere bleibt also genau so, wie es vorher war."),
        ("ein kleiner blauer Würfel neben einer Kugel", "eine kurze gelbe Jacke ohne Streifen"),
    ),
    (  # French
        ("Sur l'image on voit un petit cube rouge et une boule", "La photo montre une longue veste verte à rayures"),
        (
            ", et à côté se trouvent encore deux autres objets sur la table",
            ", et derrière se trouve une grande maison au bord de l'eau",
        ),
        (
            ". Il faut donc que l'objet cherché soit d'une autre couleur.",
            ". Tout le reste demeure exactement comme il était avant.",
        ),
        ("un petit cube bleu à côté d'une boule", "une veste courte et jaune sans rayures"),
    ),
    (  # Spanish
        ("En la imagen se ve un pequeño cubo rojo y una bola", "La foto muestra una chaqueta larga y verde con rayas"),
        (", y al lado hay otros dos objetos sobre la mesa", ", y detrás se encuentra una casa muy grande junto al río"),
        (". Por eso el objeto buscado tiene que ser de otro color.", ". Todo lo demás queda exactamente como estaba antes."),
        ("un pequeño cubo azul al lado de una bola", "una chaqueta corta y amarilla sin rayas"),
    ),
    (  # Italian
        ("Nell'immagine si vede un piccolo cubo rosso e una palla", "La foto mostra una lunga giacca verde con le righe"),
        (", e accanto ci sono ancora altri due oggetti sul tavolo", ", e dietro si trova una casa molto grande vicino al fiume"),
        (". Perciò l'oggetto cercato deve essere di un altro colore.", ". Tutto il resto rimane esattamente come era prima."),
        ("un piccolo cubo azzurro accanto a una palla", "una giacca corta e gialla senza righe"),
    ),
    (  # Russian
        ("На картинке виден маленький красный куб и рядом с ним шар", "На снимке показана длинная зелёная куртка в полоску"),
        (", а на столе лежат ещё два других предмета", ", а позади стоит большой дом на берегу реки"),
        (". Поэтому искомый предмет должен быть другого цвета.", ". Всё остальное остаётся точно таким, каким было раньше."),
        ("маленький синий куб рядом с шаром", "короткая жёлтая куртка без полосок"),
    ),
    (  # Chinese; the answer stays English, as a clause without blanks may count as one token
        ("图片里，有一个红色的方块，旁边，是一个绿色的球", "照片上，是一件绿色的长外套，上面，有白色的条纹"),
        ("，桌子上，还放着两样东西，一大，一小", "，后面，有一座大房子，靠近河边，很安静"),
        ("。所以，要找的东西，应该是另一种颜色。", "。其余的部分，都和原来一样，没有变化。"),
        ("",),
    ),
)
"""By language three parts of a text, and answers, each in several wordings."""
