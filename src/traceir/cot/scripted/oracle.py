"""A scripted teacher: it knows the truth of an M-BEIR folder, and answers the questions of ask.py from their content alone.

Data sets with labels (`cot/train`, as MiniBEIR's) are answered from them. For others, queries of picture and text are complex,
and their reasoning is a script over the captions of the folder's own pictures; all other queries are direct.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from traceir.cot.ask import Stage, block, blocks
from traceir.cot.rules import plain, words_of
from traceir.cot.source import COMPOSED, find_captions
from traceir.cot.teachers.teacher import PIXELS, image_url, key_of, read_image
from traceir.data import mbeir
from traceir.data.cot import PoolFile
from traceir.data.samples import task_prompts
from traceir.errors import DataError, InputError

_SEES: Final = "see "
"""How MiniBEIR's labels begin where they name the source picture; its description goes on to the first semicolon."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What is known of all training queries of one content.

    `source`: the picture to be changed in words, where the target is a picture; "" for others and where it is not known.
    """

    qids: tuple[str, ...]
    task: str
    z: int
    steps: int
    reasoning: str
    answer: str
    source: str


@dataclass(frozen=True, slots=True)
class Asked:
    """One question, read. `digest` is of stage, texts and pictures; `key` of the whole body, equal to the client's own key.

    Both are 64 hex digits. `words` and `pictures` count those of the whole prompt.
    """

    stage: Stage
    entry: Entry
    proposal: str
    system: str
    digest: str
    key: str
    words: int
    images: int


class Oracle:
    """Answers for the train split below `root`. Reads all its queries and query pictures at once, and keeps digests and labels.

    Pictures are known as they lie there, and as OpenAITeacher sends them with at most `pixels` pixels. About 0.6 KB of memory a
    query. Raises DataError where the folder has no training queries or breaks its format, PictureError for a broken picture.
    """

    def __init__(self, root: Path | str, *, pixels: int = PIXELS) -> None:
        self.root, self.pixels = Path(root), pixels
        self._sent: dict[str, str] = {}
        """Digest of a picture file -> that of the picture as it is sent, where they differ."""
        self._entries: dict[bytes, Entry] = {}
        self._complex: dict[str, list[Entry]] = {}
        datasets = mbeir.train_datasets(self.root)
        if not datasets:
            raise DataError(f"{root} has no training queries below query/train; give the root of a folder in M-BEIR's layout")
        labelled = [name for name in datasets if mbeir.train_labels_path(self.root, name).exists()]
        for dataset in labelled:
            self._add_all(dataset, _from_labels(self.root, dataset))
        if others := [name for name in datasets if name not in labelled]:
            script = _Script(self.root)
            for dataset in others:
                self._add_all(dataset, script.entries(dataset))

    def __len__(self) -> int:
        return len(self._entries)

    def read(self, body: Mapping[str, Any]) -> Asked:
        """The question in a chat body. Raises InputError for a body that is none, and for an unknown query."""
        system, texts, images, bare = _read_messages(body)
        shown = {name: text for part in texts for name, text in blocks(part).items()}
        stage: Stage = "verify" if "proposal" in shown else "reason" if "<reasoning>" in system else "assess"
        digest = _hash([stage, system, texts, images])
        key = key_of({**body, "messages": bare})
        words = len(system.split()) + sum(len(text.split()) for text in texts)
        entry = self._find(shown, stage, images)
        return Asked(stage, entry, shown.get("proposal", ""), system, digest, key, words, len(images))

    def answer(self, asked: Asked) -> str:
        """The true reply. Raises InputError for reasoning about a direct query: there is none."""
        entry, sure = asked.entry, _confidence(asked.digest)
        if asked.stage == "assess":
            return json.dumps({"complex": bool(entry.z), "reason": _why(entry), "confidence": sure})
        if asked.stage == "reason":
            if not entry.z:
                raise InputError(f"query {entry.qids[0]} of {entry.task} is direct; the oracle knows no reasoning for it")
            return well_formed(entry.reasoning, entry.answer)
        right = bool(entry.answer) and plain(asked.proposal) == plain(entry.answer)
        said = "It describes the true target." if right else "It describes something else than the true target."
        return json.dumps({"verdict": "yes" if right else "no", "confidence": sure, "reason": said})

    def reply(self, body: Mapping[str, Any]) -> str:
        """The text of the true reply to a chat body; `read`, then `answer`."""
        return self.answer(self.read(body))

    def other(self, entry: Entry, draw: int) -> Entry | None:
        """Another complex query of the same task with another answer, chosen by `draw`; None where the task has none."""
        there = self._complex.get(entry.task, [])
        mine = plain(entry.answer)
        found = (there[(draw + step) % len(there)] for step in range(len(there)))
        return next((one for one in found if plain(one.answer) != mine), None)

    def _find(self, shown: Mapping[str, str], stage: Stage, images: Sequence[str]) -> Entry:
        """The first picture is the query's; of a verifier's question it may be the target's, where the query has none."""
        if "task" not in shown:
            raise InputError("the question has no <task> block; ask with the templates of traceir.cot.ask")
        task, text = shown["task"], shown.get("query", "")
        first = self._sent.get(images[0], images[0]) if images else ""
        found = self._entries.get(_content(task, text, first))
        if found is None and stage == "verify":
            found = self._entries.get(_content(task, text, ""))
        if found is None:
            seen = f"a picture of sha256 {first[:12]}" if first else "no picture"
            raise InputError(
                f"no training query of {self.root} is this one: task {task!r}, text {text[:80]!r}, {seen}; "
                f"ask about its train split, with pictures as they are or shrunk to {self.pixels} pixels by the teacher client"
            )
        return found

    def _add_all(self, dataset: str, entries: Iterator[tuple[mbeir.Record, Entry]]) -> None:
        """Adds a data set's entries; of those with equal content the first stands for all, and bears all qids."""
        images: dict[str, str] = {}
        for record, entry in tqdm(entries, desc=f"learning {dataset}", unit="query", delay=2.0):
            path = record.image_path
            if path and path not in images:
                images[path] = self._learn_image(self.root / path)
            text = blocks(block("query", record.text)).get("query", "") if record.text else ""
            key = _content(entry.task, text, images[path] if path else "")
            known = self._entries.get(key)
            if known is not None:
                self._entries[key] = replace(known, qids=known.qids + entry.qids)
                continue
            self._entries[key] = entry
            if entry.z:
                self._complex.setdefault(entry.task, []).append(entry)

    def _learn_image(self, path: Path) -> str:
        """The digest of a picture as it is sent."""
        sent = image_url(path, self.pixels)[1]
        if (own := hashlib.sha256(read_image(path)).hexdigest()) != sent:
            self._sent[own] = sent
        return sent


class _Script:
    """Reasoning for data sets without labels, told from the captions that the folder has for its pictures."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.captions = find_captions(root, None)
        self.instructions = mbeir.read_instructions(root)

    def entries(self, dataset: str) -> Iterator[tuple[mbeir.Record, Entry]]:
        nouns: dict[int, str] = {}
        pool = PoolFile(mbeir.train_pool_path(self.root))
        try:
            for record in mbeir.read_train(self.root, dataset):
                task = f"{dataset}_task{record.task_id}"
                if record.task_id not in COMPOSED or not record.image_path or not record.text:
                    yield record, Entry((record.qid,), task, 0, 0, "", "", "")
                    continue
                if record.task_id not in nouns:
                    nouns[record.task_id] = self._noun(dataset, record)
                source = self.captions.get(record.image_path, "")
                target = self._target(record, pool)
                reasoning, answer = tell(_clean(source, 24), _clean(record.text, 60), _clean(target, 24), nouns[record.task_id])
                yield record, Entry((record.qid,), task, 1, 1, reasoning, answer, source if _is_edit(record) else "")
        finally:
            pool.close()

    def _target(self, record: mbeir.Record, pool: PoolFile) -> str:
        """The first positive in words: its text, else its picture's caption; "" where it has neither."""
        did = next((did for did in record.positives if did in pool), None)
        if did is None:
            return ""
        candidate = pool[did]
        return candidate.text or self.captions.get(candidate.image_path or "", "")

    def _noun(self, dataset: str, record: mbeir.Record) -> str:
        """What its targets are called: the data set's name where the task's instructions use it as a word, else `picture`."""
        prompts = " ".join(task_prompts(self.instructions, record.qid, record.task_id))
        return dataset if dataset.lower() in words_of(prompts) else "picture"


def tell(source: str, change: str, target: str, noun: str) -> tuple[str, str]:
    """Scripted reasoning and answer of a composed query. `source` and `target` are "" where no caption is known."""
    if target:
        answer = f"{noun} of {target}"
    elif source:
        answer = f"{noun} of {source}, but changed as asked: {change}"
    else:
        answer = f"the same thing as in the picture, but changed as asked: {change}"
    reasoning = (
        f"The picture shows {source or 'what is to be changed'}. The change asks for this: {change}. Everything that it leaves "
        f"unsaid stays the same as in the picture. So the target is {answer}."
    )
    return reasoning, answer


def well_formed(reasoning: str, answer: str) -> str:
    """A reply in the form that is asked for."""
    return f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"


def _from_labels(root: Path, dataset: str) -> Iterator[tuple[mbeir.Record, Entry]]:
    labels = mbeir.read_labels(mbeir.train_labels_path(root, dataset))
    for record in mbeir.read_train(root, dataset):
        task = f"{dataset}_task{record.task_id}"
        label = labels.get(record.qid)
        if label is None or not label.z:
            yield record, Entry((record.qid,), task, 0, label.steps if label else 0, "", "", "")
            continue
        reasoning = label.reasoning or ""
        named = _is_edit(record) and reasoning.startswith(_SEES)
        source = reasoning.removeprefix(_SEES).partition(";")[0] if named else ""
        yield record, Entry((record.qid,), task, 1, label.steps, reasoning, label.answer or "", source)


def _is_edit(record: mbeir.Record) -> bool:
    """Whether it asks for a picture like its own, with a change: only its answer can be the source's description again."""
    return mbeir.TASK_MODALITIES[record.task_id] == ("image,text", "image")


def _why(entry: Entry) -> str:
    if not entry.z:
        return "What it shows or says already describes the target."
    if not entry.source:
        return "The target follows only from facts that depend on each other."
    return "The target follows only from changes applied to the picture."


def _clean(text: str, most: int) -> str:
    """At most `most` words, in one line, without angle brackets and a last full stop."""
    return " ".join(text.replace("<", " ").replace(">", " ").split()[:most]).rstrip(" .")


def _confidence(digest: str) -> float:
    """0.75 to 0.99 in hundredths."""
    return (75 + int(digest[:8], 16) % 25) / 100


def _content(task: str, text: str, image: str) -> bytes:
    return hashlib.blake2b("\x00".join((task, text, image)).encode(errors="surrogatepass"), digest_size=16).digest()


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _read_messages(body: Mapping[str, Any]) -> tuple[str, list[str], list[str], list[dict[str, Any]]]:
    """System text, the user's texts, and the sha256 of the user's pictures, in reading order.

    Last the messages with digests in place of data URLs, as the client's keys are made of.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InputError(f"messages is {str(messages)[:80]!r}; send a list with a system and a user message")
    system: list[str] = []
    texts: list[str] = []
    images: list[str] = []
    bare: list[dict[str, Any]] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("content"), (str, list)):
            raise InputError(f"a message is {str(message)[:80]!r}; it must be an object with role and content")
        content = message["content"]
        into = system if message.get("role") in ("system", "developer") else texts
        parts: list[Any] = []
        told: list[Any] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in told:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                into.append(part["text"])
                parts.append(part)
            elif kind == "image_url" and isinstance(part.get("image_url"), dict):
                images.append(_image_digest(part["image_url"].get("url")))
                parts.append({**part, "image_url": {**part["image_url"], "url": f"sha256:{images[-1]}"}})
            else:
                raise InputError(f"a part of a message is {str(part)[:80]!r}; send text and image_url parts")
        bare.append({**message, "content": content if isinstance(content, str) else parts})
    return "\n".join(system), texts, images, bare


def _image_digest(url: object) -> str:
    head, comma, payload = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise InputError(f"a picture's url is {str(url)[:40]!r}; send a data URL in base64")
    try:
        return hashlib.sha256(base64.b64decode(payload, validate=True)).hexdigest()
    except (binascii.Error, ValueError) as error:
        raise InputError(f"a picture's data URL is not base64 ({error}); encode its bytes anew") from error
