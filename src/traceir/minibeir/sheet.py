"""A contact sheet of a data folder: one line for each row, each cell a query and its positive side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from traceir.data.mbeir import Candidate, Record, Task, find_tasks, read_labels, read_pool, read_queries
from traceir.errors import DataError, InputError
from traceir.images import ImageInput

_PANEL, _TEXT, _GAP, _MARGIN, _LABEL, _ARROW = 132, 78, 12, 24, 150, 36  # pixels
_PAPER, _CARD, _INK, _PALE, _EDGE = "#f5f4f0", "#ffffff", "#22252b", "#7b808a", "#dcdad2"
_CELL = 2 * _PANEL + 2 * _GAP + _ARROW


def write_sheet(root: Path, out: Path, per_row: int = 6) -> Path:
    """Writes a PNG with `per_row` test queries of every row, chosen evenly over the split; returns its path."""
    if per_row < 1:
        raise InputError(f"per_row is {per_row}; give at least 1")
    tasks = find_tasks(root, "test")
    # There is room for text below images only where both come together.
    heights = [_PANEL + 2 * _GAP + _TEXT * ("image,text" in (task.query_modality, task.cand_modality)) for task in tasks]
    width = _MARGIN * 2 + _LABEL + per_row * (_CELL + _GAP)
    sheet = Image.new("RGB", (width, _MARGIN * 2 + sum(heights) + _GAP * len(heights)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    top = _MARGIN
    for task, height in zip(tasks, heights, strict=True):
        dataset, _, number = task.name.rpartition("_")
        lines = (
            (8, dataset, _INK, 20),
            (36, number, _PALE, 15),
            (58, f"{task.query_modality}\nto {task.cand_modality}", _PALE, 14),
        )
        for down, text, colour, size in lines:
            draw.text((_MARGIN, top + down), text, fill=colour, font=ImageFont.load_default(size))
        for column, (record, answer, steps) in enumerate(_choose(task, per_row)):
            left = _MARGIN + _LABEL + column * (_CELL + _GAP)
            draw.rounded_rectangle((left, top, left + _CELL, top + height), 8, fill=_CARD, outline=_EDGE)
            _draw_panel(sheet, left + _GAP, top + _GAP, task.root, record)
            _draw_panel(sheet, left + _GAP + _PANEL + _ARROW, top + _GAP, task.root, answer)
            arrow, middle = left + _GAP + _PANEL + 5, top + _GAP + _PANEL // 2
            draw.line((arrow, middle, arrow + 18, middle), fill=_PALE, width=2)
            draw.polygon([(arrow + 18, middle - 5), (arrow + 18, middle + 5), (arrow + 26, middle)], fill=_PALE)
            draw.text((arrow + 12, middle - 12), steps, fill=_PALE, font=ImageFont.load_default(13), anchor="mb")
        top += height + _GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG", optimize=True)
    return out


def _choose(task: Task, count: int) -> Iterator[tuple[Record, Candidate, str]]:
    """Queries of differing numbers of steps with one positive each that the local pool holds."""
    pool = {candidate.did: candidate for candidate in read_pool(task.pool_path)}
    steps = {qid: label.steps for qid, label in read_labels(task.labels_path).items()}
    records = [record for record in read_queries(task.query_path) if any(did in pool for did in record.positives)]
    if not records:
        raise DataError(f"{task.query_path}: no query has a positive in {task.pool_path}; check that both belong together")
    ordered = sorted(records, key=lambda record: steps.get(record.qid, 0))
    for index in sorted({(2 * index + 1) * len(ordered) // (2 * count) for index in range(count)}):
        record = ordered[index]
        yield record, pool[next(did for did in record.positives if did in pool)], str(steps.get(record.qid, ""))


def _draw_panel(sheet: Image.Image, left: int, top: int, root: Path, shown: Record | Candidate) -> None:
    """An image with its text below, or the text alone over the whole height."""
    lines = textwrap.wrap(shown.text or "", 22, max_lines=5 if shown.image_path else 9, placeholder=" …")
    if shown.image_path is None:
        top += (_PANEL - 15 * len(lines)) // 2
    else:
        image = ImageOps.contain(ImageInput.open(root / shown.image_path).load(), (_PANEL, _PANEL), Image.Resampling.LANCZOS)
        sheet.paste(image, (left + (_PANEL - image.width) // 2, top + (_PANEL - image.height) // 2))
        top += _PANEL + 4
    draw = ImageDraw.Draw(sheet)
    draw.multiline_text((left, top), "\n".join(lines), fill=_INK, font=ImageFont.load_default(12), spacing=3)
