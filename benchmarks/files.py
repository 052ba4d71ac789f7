"""Every kind of file that a phone and an office make: what `traceir index add` reads of each, or the reason it gives.

`python -m benchmarks.files --markdown docs/results/files.md` makes such a folder, adds it from the command line, and tells.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image, ImageDraw

from traceir.collection.sources import Failure, Note, Source, find_sources
from traceir.errors import TraceError

EPILOGUE: Final = "The table is written by `python -m benchmarks.files --markdown docs/results/files.md`."
_BYTE, _ASCII, _SHORT, _LONG, _RATIO, _SIGNED = 1, 2, 3, 4, 5, 10
_FORMS: Final = {_SHORT: "H", _LONG: "I", _BYTE: "B"}
Tags = Mapping[int, tuple[int, Any]]


def picture(seed: int = 0, width: int = 320, height: int = 240) -> Image.Image:
    """A scene that is not symmetric: turned or mirrored, it differs."""
    image = Image.new("RGB", (width, height), (200, 220 - seed * 7 % 200, 240))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 2 // 3, width, height), fill=(40, 120 + seed * 13 % 100, 60))
    draw.ellipse((10, 10, width // 4, width // 4), fill=(250, 210, 40))
    return image


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = BytesIO()
    if format == "HEIF":
        from pillow_heif import from_pillow

        from_pillow(image).save(buffer, **options)
    else:
        image.save(buffer, format, **options)
    return buffer.getvalue()


def exif(orientation: int = 1) -> bytes:
    """As a phone writes it: orientation, camera, date with its offset, and a position."""
    made = Image.Exif()
    made.update({0x0112: orientation, 0x010F: "Apple", 0x0110: "iPhone 15 Pro", 0x0132: "2024:06:01 00:00:00"})
    made.get_ifd(0x8769).update({0x9003: "2024:05:17 18:03:21", 0x9011: "+02:00"})
    made.get_ifd(0x8825).update({1: "N", 2: (59.0, 54.0, 50.4), 3: "E", 4: (10.0, 45.0, 7.2)})
    return made.tobytes()


def dng(width: int = 64, height: int = 48, *, preview: Image.Image | None = None, orientation: int = 1) -> bytes:
    """A raw photograph of 16 bits (Adobe's DNG 1.4), with a JPEG preview before it where there is one."""
    mosaic = (np.arange(width * height, dtype=np.uint32) * 65_521 // 7 % 60_000).astype("<u2").tobytes()
    matrix = struct.pack("<18i", *(part for number in range(9) for part in (int(number % 4 == 0), 1)))
    raw: Tags = {
        254: (_LONG, 0),
        256: (_LONG, width),
        257: (_LONG, height),
        258: (_SHORT, 16),
        259: (_SHORT, 1),
        262: (_SHORT, 32_803),
        277: (_SHORT, 1),
        278: (_LONG, height),
        273: (_LONG, mosaic),
        279: (_LONG, len(mosaic)),
        33_421: (_SHORT, (2, 2)),
        33_422: (_BYTE, (0, 1, 1, 2)),
    }
    camera: Tags = {
        271: (_ASCII, b"Fotowerk\0"),
        272: (_ASCII, b"Fotowerk R1\0"),
        274: (_SHORT, orientation),
        306: (_ASCII, b"2023:12:24 17:00:00\0"),
        50_706: (_BYTE, (1, 4, 0, 0)),
        50_708: (_ASCII, b"Fotowerk R1\0"),
        50_721: (_SIGNED, matrix),
        50_728: (_RATIO, struct.pack("<6I", *(1, 1) * 3)),
    }
    if preview is None:
        return _tiff([{**raw, **camera}])
    jpeg = saved(preview, "JPEG")
    shown: Tags = {
        254: (_LONG, 1),
        256: (_LONG, preview.width),
        257: (_LONG, preview.height),
        258: (_SHORT, (8, 8, 8)),
        259: (_SHORT, 7),
        262: (_SHORT, 6),
        277: (_SHORT, 3),
        278: (_LONG, preview.height),
        273: (_LONG, jpeg),
        279: (_LONG, len(jpeg)),
        330: (_LONG, None),
    }
    return _tiff([{**shown, **camera}, raw])


def _tiff(headers: Sequence[Tags]) -> bytes:
    """The first header, and behind it the second, to which its tag 330 points. A value of bytes behind _LONG is data."""
    starts, at = [], 8
    for header in headers:
        starts.append(at)
        at += 2 + 12 * len(header) + 4
    body, parts = b"", []
    for header in headers:
        entries = b""
        for tag, (kind, value) in sorted(header.items()):
            if value is None:
                value = starts[1]
            if kind == _LONG and isinstance(value, bytes):
                count, data, body = 1, struct.pack("<I", at + len(body)), body + value
            elif isinstance(value, bytes):
                count, data = len(value) // (8 if kind in (_RATIO, _SIGNED) else 1), value
            else:
                values = value if isinstance(value, tuple) else (value,)
                count, data = len(values), struct.pack(f"<{len(values)}{_FORMS[kind]}", *values)
            if len(data) > 4:
                data, body = struct.pack("<I", at + len(body)), body + data + b"\0" * (len(data) % 2)
            entries += struct.pack("<HHI", tag, kind, count) + data.ljust(4, b"\0")
        parts.append(struct.pack("<H", len(header)) + entries + bytes(4))
    return b"II*\0" + struct.pack("<I", 8) + b"".join(parts) + body


def video(
    scenes: Sequence[Image.Image],
    format: str = "mp4",
    *,
    seconds: int = 6,
    rate: int = 4,
    codec: str = "h264",
    rotation: int = 0,
    **metadata: str,
) -> bytes:
    """Each scene for so many seconds, a keyframe every two."""
    import av

    buffer = BytesIO()
    options = {"movflags": "use_metadata_tags"} if format in ("mp4", "mov") else {}
    with av.open(buffer, "w", format=format, options=options) as container:
        container.metadata.update(metadata)
        stream: Any = container.add_stream(codec, rate=rate, options={"g": str(2 * rate)})
        stream.width, stream.height, stream.pix_fmt = *scenes[0].size, "yuv420p"
        for number in range(len(scenes) * seconds * rate):
            frame = av.VideoFrame.from_image(scenes[number // (seconds * rate)])
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    data = buffer.getvalue()
    return _turned(data, rotation) if rotation else data


def _turned(mp4: bytes, rotation: int) -> bytes:
    """With the matrix of the picture's track turned clockwise by 90 or 180 degrees, as a phone that is held so writes it."""
    matrix = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[rotation]
    a, b, c, d = (part << 16 for part in matrix)
    start = mp4.index(b"tkhd") + 4 + 4 + 20 + 16
    return mp4[:start] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + mp4[start + 36 :]


def pdf(*pages: str | Image.Image | None, title: str = "", size: tuple[float, float] = (595, 842)) -> bytes:
    """Pages of text, of a picture, or empty."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"", b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>"]
    kids = []
    for page in pages:
        content, resources = b"", b"/Font<</F 3 0 R>>"
        if isinstance(page, str):
            lines = "".join(f"({line}) Tj 0 -20 Td " for line in page.split("\n"))
            content = f"BT /F 14 Tf 50 {size[1] - 60:g} Td {lines}ET".encode("latin-1")
        elif page is not None:
            jpeg = saved(page, "JPEG")
            head = (
                f"<</Type/XObject/Subtype/Image/Width {page.width}/Height {page.height}/ColorSpace/DeviceRGB/BitsPerComponent 8"
            )
            objects.append(f"{head}/Filter/DCTDecode/Length {len(jpeg)}>>stream\n".encode() + jpeg + b"\nendstream")
            resources = f"/XObject<</I {len(objects)} 0 R>>".encode()
            content = f"q {size[0]:g} 0 0 {size[1]:g} 0 0 cm /I Do Q".encode()
        objects.append(f"<</Length {len(content)}>>stream\n".encode() + content + b"\nendstream")
        box = f"/Parent 2 0 R/MediaBox[0 0 {size[0]:g} {size[1]:g}]/Contents {len(objects)} 0 R".encode()
        objects.append(b"<</Type/Page" + box + b"/Resources<<" + resources + b">>>>")
        kids.append(len(objects))
    objects[1] = f"<</Type/Pages/Count {len(kids)}/Kids[{' '.join(f'{kid} 0 R' for kid in kids)}]>>".encode()
    objects.append(f"<</Title({title})/CreationDate(D:20240229120000+01'00')>>".encode("latin-1"))
    return _pdf_file(objects, f"/Root 1 0 R/Info {len(objects)} 0 R".encode())


def encrypted_pdf() -> bytes:
    """By a user's password (40-bit RC4), which PDFium asks for."""
    objects = [
        b"<</Type/Catalog/Pages 2 0 R>>",
        b"<</Type/Pages/Count 1/Kids[3 0 R]>>",
        b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]>>",
        b"<</Filter/Standard/V 1/R 2/P -4/O<" + b"41" * 32 + b">/U<" + b"42" * 32 + b">>>",
    ]
    return _pdf_file(objects, b"/Root 1 0 R/Encrypt 4 0 R/ID[<00><00>]")


def _pdf_file(objects: Sequence[bytes], trailer: bytes) -> bytes:
    data, offsets = b"%PDF-1.7\n", []
    for number, written in enumerate(objects, start=1):
        offsets.append(len(data))
        data += f"{number} 0 obj\n".encode() + written + b"\nendobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    head = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n<</Size {len(objects) + 1}".encode()
    return data + head + trailer + f">>\nstartxref\n{len(data)}\n%%EOF\n".encode()


LONG_TEXT: Final = "\n\n".join(
    f"Chapter {number}. "
    + " ".join(f"In the {word} room stood a {word} chair of {number} legs." for word in ("red", "blue", "old") * 5)
    for number in range(1, 9)
)


def make(folder: Path) -> None:
    """The folder, with whatever names and rights this file system takes."""
    for name, data in {**_pictures(), **_films(), **_documents(), **_texts(), **_oddities()}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "broken-link.jpg").symlink_to("nowhere.jpg")
    (folder / "own-link.jpg").symlink_to("own-link.jpg")
    os.mkfifo(folder / "pipe.jpg")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "no-rights.jpg").write_bytes(saved(picture(), "JPEG"))
    (folder / "no-rights.jpg").chmod(0)
    with contextlib.suppress(OSError):
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jpg")).write_bytes(saved(picture(), "JPEG"))


def _pictures() -> dict[str, bytes]:
    shot, frames = picture(1), [picture(seed) for seed in (3, 4)]
    heic = saved(shot, "HEIF", exif=exif(6))
    jpeg = saved(shot, "JPEG", exif=exif(6))
    return {
        "phone/IMG_0001.HEIC": heic,
        "phone/IMG_0001.MOV": video([shot], "mov", seconds=3),
        "phone/IMG_0002.JPG": jpeg,
        "phone/IMG_0003.jpg": heic,
        "phone/IMG_0004.avif": saved(shot, "AVIF", exif=exif(6)),
        "phone/IMG_0005.jpg": saved(shot, "PNG"),
        "phone/IMG_0006.PNG": saved(shot, "PNG"),
        "phone/motion.jpg": jpeg + video([shot]),
        "camera/DSC_0001.DNG": dng(preview=picture(2, 800, 600), orientation=6),
        "camera/DSC_0002.dng": dng(),
        "camera/DSC_0003.NEF": dng(preview=picture(2, 800, 600))[:700],
        "camera/DSC_0004.CR3": jpeg,
        "web/a.webp": saved(shot, "WEBP"),
        "web/b.gif": saved(shot, "GIF"),
        "web/c.bmp": saved(shot, "BMP"),
        "web/moving.gif": saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "web/moving.webp": saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "web/moving.avif": saved(frames[0], "AVIF", save_all=True, append_images=frames[1:]),
        "office/scan.tiff": saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        "web/drawing.svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "web/layers.psd": b"8BPS",
        "web/favicon.ico": b"\0\0\1\0",
        "damaged/cut.jpg": jpeg[: len(jpeg) // 2],
        "damaged/cut.heic": heic[: len(heic) // 2],
        "damaged/cut.png": saved(shot, "PNG")[:-90],
        "damaged/empty.jpg": b"",
        "damaged/empty.heic": b"",
        "damaged/video.jpg": video([shot]),
    }


def _films() -> dict[str, bytes]:
    scenes = [picture(seed) for seed in (5, 60, 150)]
    whole = video(scenes, creation_time="2024-05-17T16:03:21Z", location="+59.9140+010.7520/")
    return {
        "phone/VID_0001.mp4": whole,
        "phone/VID_0002.mov": video(scenes[:2], "mov", rotation=90),
        "web/clip.webm": video(scenes, "webm", codec="libvpx-vp9"),
        "web/clip.mkv": video(scenes[:2], "matroska"),
        "damaged/cut.mp4": whole[: len(whole) // 2],
        "damaged/words.mp4": b"no video at all",
        "damaged/empty.mov": b"",
    }


def _documents() -> dict[str, bytes]:
    paper = pdf("Invoice 2024-117\nfor a red bicycle", picture(7), None, title="Invoice")
    documents = {
        f"office/{name}": _zip(part)
        for name, part in (
            ("letter.docx", "word/document.xml"),
            ("sums.xlsx", "xl/workbook.xml"),
            ("talk.pptx", "ppt/presentation.xml"),
            ("note.odt", "content.xml"),
            ("all.zip", "a.txt"),
        )
    }
    return {
        **documents,
        "office/invoice.pdf": paper,
        "office/secret.pdf": encrypted_pdf(),
        "damaged/cut.pdf": paper[:400],
        "damaged/empty.pdf": b"",
        "office/poster.pdf": pdf("A poster", size=(14_400, 14_400)),
        "office/ribbon.pdf": pdf("A ribbon", size=(14_400, 20)),
    }


def _texts() -> dict[str, bytes]:
    return {
        "notes/short.txt": b"Milk, bread, a lamp for the hall.",
        "notes/book.txt": LONG_TEXT.encode(),
        "notes/readme.md": b"# Garden\n\nRoses.",
        "notes/bom.txt": "\ufeffÅrsmøte i mai".encode(),
        "notes/wide.txt": "Årsmøte".encode("utf-16"),
        "notes/latin.txt": b"caf\xe9",
        "notes/blank.txt": b"\n",
        "office/stock.csv": "id;title;price\nc1;Käse;3.5\n".encode("cp1252"),
        "office/stock.jsonl": b'{"id": "j1", "text": "a lamp"}\n',
    }


def _oddities() -> dict[str, bytes]:
    jpeg = saved(picture(9), "JPEG")
    return {
        "phone/memo.m4a": b"\0\0\0\x1cftypM4A ",
        "phone/.DS_Store": b"\0\0\0\1Bud1",
        "office/Thumbs.db": b"\xd0\xcf\x11\xe0",
        "odd/smile \U0001f600.jpg": jpeg,
        "odd/two\nlines.jpg": jpeg,
        "odd/a#page=3.jpg": jpeg,
        "odd/100% & more.jpg": jpeg,
    }


def _zip(part: str) -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(part, "<x/>")
    return buffer.getvalue()


def table(folder: Path) -> list[tuple[str, str, str]]:
    """Of every file below the folder: what it was read as, or why not; in order of name."""
    named = [folder / "office/stock.csv", folder / "office/stock.jsonl"]
    read: dict[str, list[str]] = defaultdict(list)
    refused: dict[str, str] = {}
    for outcome in find_sources([folder, *named]):
        if isinstance(outcome, Note):
            refused[_name(folder, outcome.location)] = outcome.what
            continue
        if isinstance(outcome, Failure):
            refused[_name(folder, outcome.location)] = outcome.reason
            continue
        try:
            item, _ = outcome.make_item()
            for image in item.images:
                image.load()
            shown = {name: value for name, value in item.fields.items() if not name.startswith("_")}
            read[_name(folder, str(outcome.path))].append(
                f"{_part(outcome)}: {item.modality} {json.dumps(shown, ensure_ascii=False)}"
            )
        except TraceError as error:
            refused[_name(folder, outcome.location)] = str(error).replace(str(folder) + "/", "")
    if os.geteuid() == 0:
        refused["no-rights.jpg"] = "was read by root, who may; others are told to check its rights"
    rows = []
    for path in sorted(set(read) | set(refused)):
        rows.append((path, _short(read.get(path, [])), refused.get(path, "")))
    return rows


def _name(folder: Path, location: str) -> str:
    return (
        location.replace(str(folder) + "/", "").replace(str(folder), "(the folder)").encode("utf-8", "backslashreplace").decode()
    )


def _part(source: Source) -> str:
    return source.id.rpartition("#")[2] if source.part else "whole" if source.kind != "line" else f"id {source.id}"


def _short(items: Sequence[str]) -> str:
    return "; ".join([*items[:3], *([f"and {len(items) - 3} more"] if len(items) > 3 else [])])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="make it here, and keep it")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "folder"
        folder.mkdir(parents=True, exist_ok=True)
        make(folder)
        command = [
            "index",
            "add",
            folder,
            folder / "office/stock.csv",
            folder / "office/stock.jsonl",
            "--index",
            Path(scratch) / "index",
        ]
        done = subprocess.run([sys.executable, "-m", "traceir", *map(str, command)], capture_output=True, text=True, check=False)
        counts = re.search(r"added .*failed \d+", done.stdout + done.stderr)
        summary = f"`traceir index add` of it ends with status {done.returncode}: {counts[0] if counts else done.stderr}."
        page = _page(table(folder), summary)
    print(page)
    if args.markdown:
        args.markdown.write_text(page, encoding="utf-8")
    return 0 if done.returncode == 1 else 1


def _page(rows: Sequence[tuple[str, str, str]], summary: str) -> str:
    cells = ("| " + " | ".join(cell.replace("|", "\\|").replace("\n", "\\n") for cell in row) + " |" for row in rows)
    head = "| file | read as | reason or note |\n|---|---|---|"
    return f"# Files of a phone and an office\n\n{EPILOGUE} {summary}\n\n{head}\n" + "\n".join(cells) + "\n"


if __name__ == "__main__":
    sys.exit(main())
