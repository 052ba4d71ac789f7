"""A scripted teacher: it knows the truth of an M-BEIR folder, and answers the questions of ask.py from their content alone.

Faults and styles of thinking come on demand; what a question meets is decided by its content, so a resumed run sees the same.

Data sets with labels (`cot/train`, as MiniBEIR's) are answered from them. For others, queries of image and text are complex,
and their reasoning is a script over the captions of the folder's own images; all other queries are direct.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.cot.ask import TEMPLATES, Stage, block, blocks
from traceir.cot.rules import plain, words_of
from traceir.cot.source import COMPOSED, find_captions
from traceir.cot.teachers.teacher import PIXELS, canonical, image_url
from traceir.data import mbeir
from traceir.data.cot import PoolFile
from traceir.data.samples import task_prompts
from traceir.errors import DataError, InputError
from traceir.images import ImageInput

_SEES: Final = "see "
"""How MiniBEIR's labels begin where they name the source image; its description goes on to the first semicolon."""
Message = dict[str, Any]
_DATA: Final = json.loads((Path(__file__).parent / "faults.json").read_text(encoding="utf-8"))
MEANT: Final[Mapping[str, str]] = {kind: fault["rule"] for kind, fault in _DATA["content"].items()} | {"bad_json": "teacher"}
"""Fault -> what is meant to drop its reply: one of rules.RULES, `verifier`, or `teacher` where the reply cannot be read."""
CONTENT: Final[tuple[str, ...]] = tuple(_DATA["content"])
"""Faults of replies that write reasoning."""
UNREADABLE: Final = ("bad_json",)
"""Faults of the other replies."""
TRANSPORT: Final = ("rate_limit", "server_error", "stall", "cut")
"""Faults of the connection, at any stage: status 429, status 500, a reply that never comes, one that breaks off."""
ALL: Final = (*CONTENT, *UNREADABLE, *TRANSPORT)
STYLES: Final[Mapping[str, Message]] = _DATA["styles"]
"""How models and servers send thoughts -> the message of a completion, with $DRAFT for thoughts that hold all that may not be
taken for the answer, and $TEXT for the answer; `cut` is one that ran into its limit within its thoughts, `texts` writes the
numbers and booleans of an object as texts."""


@dataclass(frozen=True, slots=True)
class KnownQuery:
    """What is known of all training queries of one content.

    `source`: the image to be changed in words, where the target is an image; "" for others and where it is not known.
    """

    qids: tuple[str, ...]
    task: str
    z: int = 0
    reasoning: str = ""
    answer: str = ""
    source: str = ""


@dataclass(frozen=True, slots=True)
class ReadQuestion:
    """One question, read. `digest` is of stage, texts and images; `key` of the whole body, equal to the client's own key.

    Both are 64 hex digits. `words` and `images` count those of the whole prompt.
    """

    stage: Stage
    known: KnownQuery
    proposal: str
    system: str
    digest: str
    key: str
    words: int
    images: int


class Oracle:
    """Answers for the train split below `root`. Reads all its queries and query images at once, and keeps digests and labels.

    Images are known as they lie there, and as OpenAITeacher sends them with at most `pixels` pixels. About 0.6 KB of memory a
    query. Raises DataError where the folder has no training queries or breaks its format, ImageError for a broken image.
    """

    def __init__(self, root: Path | str, *, pixels: int = PIXELS) -> None:
        self.root, self.pixels = Path(root), pixels
        self._sent: dict[str, str] = {}
        """Digest of an image file -> that of the image as it is sent, where they differ."""
        self._known: dict[bytes, KnownQuery] = {}
        self._complex: dict[str, list[KnownQuery]] = {}
        datasets = mbeir.train_datasets(self.root)
        if not datasets:
            raise DataError(f"{root} has no training queries below query/train; give the root of a folder in M-BEIR's layout")
        labelled = [name for name in datasets if mbeir.train_labels_path(self.root, name).exists()]
        captions = find_captions(self.root, None) if len(labelled) < len(datasets) else {}
        for dataset in datasets:
            from_data = _from_labels(self.root, dataset) if dataset in labelled else _from_captions(self.root, dataset, captions)
            for record, known in tqdm(from_data, desc=f"learning {dataset}", unit="query", delay=2.0):
                self._add(record, known)

    def __len__(self) -> int:
        return len(self._known)

    def read(self, body: Mapping[str, Any]) -> ReadQuestion:
        """The question in a chat body. Raises InputError for a body that is none, and for an unknown query."""
        try:
            system, texts, images, bare = _read_messages(body["messages"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            shown = str(body.get("messages"))[:80]
            remedy = "send a system and a user message of text parts and images as data URLs in base64"
            raise InputError(f"messages is {shown!r} ({error!r}); {remedy}") from error
        shown_blocks = {name: text for part in texts for name, text in blocks(part).items()}
        stage: Stage = "verify" if "proposal" in shown_blocks else "reason" if "<reasoning>" in system else "assess"
        content = json.dumps([stage, system, texts, images], sort_keys=True).encode()
        key = hashlib.sha256(canonical({**body, "messages": bare})).hexdigest()
        words = sum(len(text.split()) for text in (system, *texts))
        known, proposal = self._find(shown_blocks, stage, images[0] if images else ""), shown_blocks.get("proposal", "")
        return ReadQuestion(stage, known, proposal, system, hashlib.sha256(content).hexdigest(), key, words, len(images))

    def answer(self, asked: ReadQuestion) -> str:
        """The true reply. Raises InputError for reasoning about a direct query: there is none."""
        known, sure = asked.known, (75 + int(asked.digest[:8], 16) % 25) / 100
        if asked.stage == "assess":
            source = "changes applied to the picture" if known.source else "facts that depend on each other"
            reason = (
                f"The target follows only from {source}." if known.z else "What it shows or says already describes the target."
            )
            return json.dumps({"complex": bool(known.z), "reason": reason, "confidence": sure})
        if asked.stage == "reason":
            if not known.z:
                raise InputError(f"query {known.qids[0]} of {known.task} is direct; the oracle knows no reasoning for it")
            return f"<reasoning>{known.reasoning}</reasoning><answer>{known.answer}</answer>"
        right = bool(known.answer) and plain(asked.proposal) == plain(known.answer)
        verdict = f"It describes {'the true target' if right else 'something else than the true target'}."
        return json.dumps({"verdict": "yes" if right else "no", "confidence": sure, "reason": verdict})

    def other(self, known: KnownQuery, draw: int) -> KnownQuery | None:
        """Another complex query of the same task with another answer, chosen by `draw`; None where the task has none."""
        others = self._complex.get(known.task, [])
        rotated = (others[(draw + step) % len(others)] for step in range(len(others)))
        return next((other for other in rotated if plain(other.answer) != plain(known.answer)), None)

    def _find(self, shown: Mapping[str, str], stage: Stage, image: str) -> KnownQuery:
        """The first image is the query's; of a verifier's question it may be the target's, where the query has none."""
        if "task" not in shown:
            raise InputError("the question has no <task> block; ask with the templates of traceir.cot.ask")
        task, text, image = shown["task"], shown.get("query", ""), self._sent.get(image, image)
        for shown_image in (image, "") if stage == "verify" else (image,):
            if (known := self._known.get(_content(task, text, shown_image))) is not None:
                return known
        seen = f"a picture of sha256 {image[:12]}" if image else "no picture"
        raise InputError(
            f"no training query of {self.root} is this one: task {task!r}, text {text[:80]!r}, {seen}; "
            f"ask about its train split, with images as they are or shrunk to {self.pixels} pixels by the teacher client"
        )

    def _add(self, record: mbeir.Record, known: KnownQuery) -> None:
        """Of queries with equal content the first stands for all, and bears all qids."""
        sent = ""
        if record.image_path:
            own = ImageInput.open(self.root / record.image_path).sha256
            sent = self._sent.get(own) or self._sent.setdefault(own, image_url(self.root / record.image_path, self.pixels)[1])
        text = blocks(block("query", record.text)).get("query", "") if record.text else ""
        key = _content(known.task, text, sent)
        if (first := self._known.setdefault(key, known)) is not known:
            self._known[key] = replace(first, qids=first.qids + known.qids)
        elif known.z:
            self._complex.setdefault(known.task, []).append(known)


def tell(source: str, change: str, target: str, noun: str) -> tuple[str, str]:
    """Scripted reasoning and answer of a composed query. `source` and `target` are "" where no caption is known."""
    changed = f"{f'{noun} of {source}' if source else 'the same thing as in the picture'}, but changed as asked: {change}"
    answer = f"{noun} of {target}" if target else changed
    reasoning = (
        f"The picture shows {source or 'what is to be changed'}. The change asks for this: {change}. Everything that it leaves "
        f"unsaid stays the same as in the picture. So the target is {answer}."
    )
    return reasoning, answer


def _from_labels(root: Path, dataset: str) -> Iterator[tuple[mbeir.Record, KnownQuery]]:
    labels = mbeir.read_labels(mbeir.train_labels_path(root, dataset))
    for record in mbeir.read_train(root, dataset):
        known, label = KnownQuery((record.qid,), f"{dataset}_task{record.task_id}"), labels.get(record.qid)
        if label is not None and label.z:
            reasoning = label.reasoning or ""
            named = _is_edit(record) and reasoning.startswith(_SEES)
            source = reasoning.removeprefix(_SEES).partition(";")[0] if named else ""
            known = replace(known, z=1, reasoning=reasoning, answer=label.answer or "", source=source)
        yield record, known


def _from_captions(root: Path, dataset: str, captions: Mapping[str, str]) -> Iterator[tuple[mbeir.Record, KnownQuery]]:
    """Reasoning for a data set without labels, told from the captions that the folder has for its images."""
    instructions = mbeir.read_instructions(root)
    with closing(PoolFile(mbeir.train_pool_path(root))) as pool:
        for record in mbeir.read_train(root, dataset):
            known = KnownQuery((record.qid,), f"{dataset}_task{record.task_id}")
            if record.task_id in COMPOSED and record.image_path and record.text:
                # Targets are called by the data set's name where the task's instructions use it as a word.
                prompts = " ".join(task_prompts(instructions, record.qid, record.task_id))
                noun = dataset if dataset.lower() in words_of(prompts) else "picture"
                source = captions.get(record.image_path, "")
                first = next((pool[did] for did in record.positives if did in pool), None)
                target = (first.text or captions.get(first.image_path or "", "")) if first else ""
                reasoning, answer = tell(_clean(source, 24), _clean(record.text, 60), _clean(target, 24), noun)
                known = replace(known, z=1, reasoning=reasoning, answer=answer, source=source if _is_edit(record) else "")
            yield record, known


def _is_edit(record: mbeir.Record) -> bool:
    """Whether it asks for an image like its own, with a change: only its answer can be the source's description again."""
    return mbeir.TASK_MODALITIES[record.task_id] == ("image,text", "image")


def _clean(text: str, most: int) -> str:
    """At most `most` words, in one line, without angle brackets and a last full stop."""
    return " ".join(text.replace("<", " ").replace(">", " ").split()[:most]).rstrip(" .")


def _content(task: str, text: str, image: str) -> bytes:
    return hashlib.blake2b("\x00".join((task, text, image)).encode(errors="surrogatepass"), digest_size=16).digest()


def _read_messages(messages: list[Any]) -> tuple[str, list[str], list[str], list[dict[str, Any]]]:
    """System text, the user's texts, and the sha256 of the user's images, in reading order.

    Last the messages with digests in place of data URLs, as the client's keys are made of.
    """
    system, texts, images, bare = list[str](), list[str](), list[str](), list[dict[str, Any]]()
    for message in messages:
        content, into = message["content"], system if message.get("role") in ("system", "developer") else texts
        if isinstance(content, str):
            into.append(content)
            bare.append(message)
            continue
        parts = []
        for part in content:
            if part["type"] == "text":
                into.append(part["text"] + "")
                parts.append(part)
            else:
                head, _, payload = part["image_url"]["url"].partition(";base64,")
                if not head.startswith("data:"):
                    raise ValueError("no data URL")
                images.append(hashlib.sha256(base64.b64decode(payload, validate=True)).hexdigest())
                parts.append({**part, "image_url": {**part["image_url"], "url": f"sha256:{images[-1]}"}})
        bare.append({**message, "content": parts})
    return "\n".join(system), texts, images, bare


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
        drawn = hashlib.sha256(f"{self.seed}:{digest}".encode()).digest()
        draws = (int.from_bytes(drawn[start : start + 4]) / 2**32 for start in range(0, 32, 4))
        for group in (CONTENT, TRANSPORT) if stage == "reason" else ((*UNREADABLE, *TRANSPORT),):
            left = [kind for kind in group if kind in self.kinds and kind not in barred]
            met, kind_draw = next(draws) < self.rate, next(draws)
            if met and left:
                return left[int(kind_draw * len(left))]
        return None


def barred_for(asked: ReadQuestion, oracle: Oracle) -> tuple[str, ...]:
    """The faults that the reply to this question cannot show: no image to copy from, no other answer to mistake it for."""
    if asked.stage != "reason":
        return ()
    source, answer = plain(asked.known.source), plain(asked.known.answer)
    copied = () if len(source.split()) > 1 and source != answer else ("source_copy",)
    return copied if oracle.other(asked.known, 0) else (*copied, "hallucination")


def spoil(kind: str, asked: ReadQuestion, oracle: Oracle) -> tuple[str, str]:
    """The spoilt reply and its finish reason, equal for equal questions. `kind`: of CONTENT or UNREADABLE."""
    draw, known = random.Random(int(asked.digest, 16)), asked.known
    if kind == "bad_json":
        return draw.choice(_DATA["unreadable"][asked.stage]), "stop"
    other = oracle.other(known, draw.getrandbits(32)) or known
    sentences = re.split(r"(?<=[.:])\s", f"{asked.system} {TEMPLATES['reason']}")
    text = draw.choice(_DATA["content"][kind]["texts"]).format(
        reasoning=known.reasoning,
        answer=known.answer,
        source=known.source,
        other_reasoning=other.reasoning,
        other_answer=other.answer,
        start=" ".join(known.reasoning.split()[:12]),
        leak=next(text.strip() for text in sentences if len(text.split()) > 8 and not set("<{") & set(text)),
    )
    return (text[: int(len(text) * draw.uniform(0.3, 0.85))], "length") if kind == "truncated" else (text, "stop")


def styled(style: str, text: str) -> Message:
    """The message of a completion that says `text` in this style; "" is plain."""
    if style == "texts" and text.startswith("{"):
        words = {True: "yes", False: "No"}
        fields = {name: words[value] if isinstance(value, bool) else value for name, value in json.loads(text).items()}
        text = json.dumps(fields | {"confidence": f"{fields['confidence']:.0%}"})
    template = json.dumps(STYLES[style] if style else {"content": "$TEXT"})
    for name, shown in (("$DRAFT", _DATA["draft"]), ("$TEXT", text)):
        template = template.replace(name, json.dumps(shown)[1:-1])
    message: Message = json.loads(template)
    return message
