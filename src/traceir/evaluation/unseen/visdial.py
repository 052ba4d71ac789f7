"""VisDial v1.0 as retrieval: ten rounds of question and answer in search of the picture they are about.

The data are Visual Dialog's (arXiv 1611.08669), the protocol FROMAGe's (arXiv 2301.13823).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from traceir.evaluation.unseen.annotations import Entry, read_object
from traceir.evaluation.unseen.task import Case, Missing, Task, settle

IMAGE_WANTED: Final = "Find me an everyday image that matches the given dialog."
METRICS: Final = ("hit@1", "hit@5", "hit@10")


def read_visdial(root: Path, missing: Missing = "stop") -> Task:
    """Dialog to image over the pictures of the validation split. The caption that comes with each dialog is not shown."""
    source = root / "visdial" / "visdial_1.0_val.json"
    data = read_object(source).entry("data")
    questions, answers = data.values("questions"), data.values("answers")
    cases: list[Case] = []
    pool: dict[str, Path] = {}
    for number, dialog in enumerate(data.entries("dialogs")):
        image = dialog.number("image_id")
        pool[str(image)] = root / "visdial" / "VisualDialog_val2018" / f"VisualDialog_val2018_{image:012}.jpg"
        text = _write_dialog(dialog, questions, answers)
        cases.append(Case(str(number), (text,), (str(image),), instruction=IMAGE_WANTED))
    return settle(Task("visdial", "VisDial", source, tuple(cases), pool, METRICS, "hit@1"), missing)


def _write_dialog(dialog: Entry, questions: list[Any], answers: list[Any]) -> str:
    rounds = dialog.entries("dialog")
    if not rounds:
        raise dialog.fail("dialog", "a list of at least one round")
    said = []
    for turn in rounds:
        question = _look_up(turn, "question", questions)
        answer = _look_up(turn, "answer", answers)
        said.append(f"Q: {question}? A: {answer}.")
    return " ".join(said)


def _look_up(turn: Entry, name: str, texts: list[Any]) -> str:
    text = texts[turn.number(name, below=len(texts))]
    if not isinstance(text, str):
        raise turn.fail(name, f"the number of a text in data.{name}s")
    return text
