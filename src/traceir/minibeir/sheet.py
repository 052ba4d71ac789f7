"""A contact sheet of a data folder: one line for each row, each cell a query and its positive side by side."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from traceir.data.mbeir import Candidate, Record, Task, find_tasks, read_labels, read_pool, read_queries
from traceir.errors import DataError, InputError
from traceir.images import ImageInput

_PANEL = 132  # pixels: width and height of one panel
_CAPTION = 78  # height of the text below a picture
_GAP = 12
_MARGIN = 24
_LABEL = 150  # width of the row's name
_PAPER, _CARD, _INK, _PALE, _EDGE = "#f5f4f0", "#ffffff", "#22252b", "#7b808a", "#dcdad2"
_ARROW = 36  # width between the two panels
_CELL_WIDTH = 2 * _PANEL + 2 * _GAP + _ARROW


def write_sheet(root: Path, out: Path, per_row: int = 6) -> Path:
    """Writes a PNG with `per_row` test queries of every row, chosen evenly over the split; returns its path."""
    if per_row < 1:
        raise InputError(f"per_row is {per_row}; give at least 1")
    tasks = find_tasks(root, "test")
    width = _MARGIN * 2 + _LABEL + per_row * (_CELL_WIDTH + _GAP)
    height = _MARGIN * 2 + sum(_measure_height(task) + _GAP for task in tasks)
    sheet = Image.new("RGB", (width, height), _PAPER)
    top = _MARGIN
    for task in tasks:
        _draw_label(sheet, (_MARGIN, top), task)
        for place, (record, answer, steps) in enumerate(_choose(task, per_row)):
            left = _MARGIN + _LABEL + place * (_CELL_WIDTH + _GAP)
            _draw_cell(sheet, (left, top), task, record, answer, steps)
        top += _measure_height(task) + _GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG", optimize=True)
    return out


def _measure_height(task: Task) -> int:
    """Height of a row's cells: with room for captions only where a picture and a text come together."""
    captioned = "image,text" in (task.query_modality, task.cand_modality)
    return _PANEL + 2 * _GAP + (_CAPTION if captioned else 0)


def _choose(task: Task, count: int) -> list[tuple[Record, Candidate, int | None]]:
    """Queries of differing numbers of steps with one positive each that the local pool holds."""
    pool = {candidate.did: candidate for candidate in read_pool(task.pool_path)}
    labels = read_labels(task.labels_path)
    records = [record for record in read_queries(task.query_path) if any(did in pool for did in record.positives)]
    if not records:
        raise DataError(f"{task.query_path}: no query has a positive in {task.pool_path}; check that both belong together")
    ordered = sorted(records, key=lambda record: labels[record.qid].steps if record.qid in labels else 0)
    places = sorted({(2 * place + 1) * len(ordered) // (2 * count) for place in range(count)})
    chosen = []
    for record in (ordered[place] for place in places):
        did = next(did for did in record.positives if did in pool)
        chosen.append((record, pool[did], labels[record.qid].steps if record.qid in labels else None))
    return chosen


def _draw_label(sheet: Image.Image, corner: tuple[int, int], task: Task) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top = corner
    dataset, _, number = task.name.rpartition("_")
    draw.text((left, top + 8), dataset, fill=_INK, font=_font(20))
    draw.text((left, top + 36), number, fill=_PALE, font=_font(15))
    draw.text((left, top + 58), f"{task.query_modality}\nto {task.cand_modality}", fill=_PALE, font=_font(14))


def _draw_cell(
    sheet: Image.Image, corner: tuple[int, int], task: Task, record: Record, answer: Candidate, steps: int | None
) -> None:
    draw = ImageDraw.Draw(sheet)
    left, top = corner
    draw.rounded_rectangle((left, top, left + _CELL_WIDTH, top + _measure_height(task)), 8, fill=_CARD, outline=_EDGE)
    _draw_panel(sheet, (left + _GAP, top + _GAP), task.root, record.text, record.image_path)
    arrow = left + _GAP + _PANEL + 5
    middle = top + _GAP + _PANEL // 2
    draw.line((arrow, middle, arrow + 18, middle), fill=_PALE, width=2)
    draw.polygon([(arrow + 18, middle - 5), (arrow + 18, middle + 5), (arrow + 26, middle)], fill=_PALE)
    if steps is not None:
        draw.text((arrow + 12, middle - 12), str(steps), fill=_PALE, font=_font(13), anchor="mb")
    _draw_panel(sheet, (left + _GAP + _PANEL + _ARROW, top + _GAP), task.root, answer.text, answer.image_path)


def _draw_panel(sheet: Image.Image, corner: tuple[int, int], root: Path, text: str | None, image_path: str | None) -> None:
    """A picture with its text below, or the text alone over the whole height."""
    left, top = corner
    if image_path is not None:
        image = ImageInput.open(root / image_path).load()
        image.thumbnail((_PANEL, _PANEL), Image.Resampling.LANCZOS)
        sheet.paste(image, (left + (_PANEL - image.width) // 2, top + (_PANEL - image.height) // 2))
        top += _PANEL + 4
    lines = _wrap(text or "", 22, 5 if image_path is not None else 9)
    if image_path is None:
        top += (_PANEL - 15 * len(lines)) // 2
    ImageDraw.Draw(sheet).multiline_text((left, top), "\n".join(lines), fill=_INK, font=_font(12), spacing=3)


def _wrap(text: str, columns: int, most: int) -> Sequence[str]:
    return textwrap.wrap(text, columns, max_lines=most, placeholder=" …")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
