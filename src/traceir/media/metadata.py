"""When, where and with what a picture was taken, as its file says: fields of its item.

Metadata are written by anyone, and often badly: what cannot be read is left out, and never an error.
"""

from __future__ import annotations

import contextlib
import html
import math
import re
import struct
import warnings
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final, cast

from PIL import Image, ImageFile, IptcImagePlugin

Fields = dict[str, str | int | float]
_WIDTH, _MAKE, _MODEL, _ORIENTATION, _DATE, _EXIF, _GPS, _XMP = 0x0100, 0x010F, 0x0110, 0x0112, 0x0132, 0x8769, 0x8825, 0x02BC
_TAKEN, _DIGITIZED, _OFFSET, _OFFSET_TAKEN, _OFFSET_DIGITIZED = 0x9003, 0x9004, 0x9010, 0x9011, 0x9012
_CITY, _COUNTRY = (2, 90), (2, 101)
_OFFSET_FORM = re.compile(r"[+-](0\d|1[0-4]):[0-5]\d")
_ISO_6709 = re.compile(r"([+-]\d{2}(?:\.\d+)?)([+-]\d{3}(?:\.\d+)?)")
_XMP_FORM: Final = r"""\bphotoshop:{0}\s*(?:=\s*["']([^"'<>]{{1,200}})["']|>\s*([^<>]{{1,200}}?)\s*<)"""
_XMP_PLACE: Final = tuple(re.compile(_XMP_FORM.format(name)) for name in ("City", "Country"))
_MAX_XMP: Final = 256 * 1024
_WRONG: Final = (*(OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError), struct.error)
"""What Pillow raises on damaged metadata."""

warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")  # of damaged metadata, which are left out


def image_fields(image: Image.Image) -> Fields:
    """`date`, `camera`, `latitude`, `longitude`, `place`, and `width` and `height` as shown, of an image whose header is read.

    Nothing is sought behind a PNG's pixels.
    """
    fields: Fields = {}
    exif, turned = Image.Exif(), False
    with contextlib.suppress(*_WRONG):
        exif = image.getexif() if image.format != "PNG" or "exif" in image.info else exif
        turned = exif.get(_ORIENTATION) in (5, 6, 7, 8)
        if image.format == "TIFF":  # Pillow from 11 turns its size
            turned &= image.width == exif.get(_WIDTH)
    with contextlib.suppress(*_WRONG):
        fields |= _place(image, exif)
    width, height = reversed(image.size) if turned else image.size
    return {**exif_fields(exif), **fields, "width": width, "height": height}


def exif_fields(exif: Image.Exif) -> Fields:
    """`date`, `camera`, `latitude` and `longitude`."""
    fields: Fields = {}
    with contextlib.suppress(*_WRONG):
        details = exif.get_ifd(_EXIF)
        dates = ((details.get(_TAKEN), _OFFSET_TAKEN), (details.get(_DIGITIZED), _OFFSET_DIGITIZED), (exif.get(_DATE), _OFFSET))
        if date := next(filter(None, (date_of(written, details.get(offset)) for written, offset in dates)), ""):
            fields["date"] = date
    with contextlib.suppress(*_WRONG):
        if camera := _camera(exif.get(_MAKE), exif.get(_MODEL)):
            fields["camera"] = camera
    with contextlib.suppress(*_WRONG):
        position = exif.get_ifd(_GPS)
        fields |= _position(_degrees(position[2], position.get(1)), _degrees(position[4], position.get(3)))
    return fields


def raw_fields(data: bytes) -> Fields:
    """Those of a raw photograph that is laid out as a TIFF file, as most are."""
    exif = Image.Exif()
    if data[:2] in (b"II", b"MM"):
        with contextlib.suppress(*_WRONG):
            exif.load((b"II*\0" if data[:1] == b"I" else b"MM\0*") + data[4:])
    return exif_fields(exif)


def video_fields(stated: Mapping[str, str]) -> Fields:
    """The same of the tags of a video, as phones write them."""
    fields: Fields = {}
    apple = "com.apple.quicktime."
    written = stated.get(f"{apple}creationdate") or stated.get("creation_time") or ""
    parts = re.match(r"(\d{4})-(\d\d)-(\d\d)[T ](\d\d:\d\d:\d\d)[.\d]*(Z|[+-]\d\d:?\d\d)?", written)
    if parts:
        year, month, day, time, zone = parts.groups()
        offset = "+00:00" if zone == "Z" else f"{zone[:3]}:{zone[-2:]}" if zone else ""
        if int(year) > 1970 and (
            date := date_of(f"{year}:{month}:{day} {time}", offset)
        ):  # 1904 and 1970: a clock that was not set
            fields["date"] = date
    tags = [stated.get(f"{apple}{name}") or stated.get(f"com.android.{android}") or stated.get(name)
            for name, android in (("make", "manufacturer"), ("model", "model"))]  # fmt: skip
    if camera := _camera(*tags):
        fields["camera"] = camera
    if found := _ISO_6709.match(stated.get(f"{apple}location.ISO6709") or stated.get("location") or ""):
        fields |= _position(float(found[1]), float(found[2]))
    return fields


def date_of(written: object, offset: object = "") -> str:
    """ISO 8601 of EXIF's `YYYY:MM:DD HH:MM:SS`, with the offset from UTC where that is known; "" for anything else."""
    if not isinstance(written, str):
        return ""
    try:
        date = datetime.strptime(written.strip(" \0")[:19].replace("-", ":"), "%Y:%m:%d %H:%M:%S").isoformat()
    except ValueError:
        return ""
    offset = offset.strip(" \0") if isinstance(offset, str) else ""
    return date + (offset if _OFFSET_FORM.fullmatch(offset) else "")


def _camera(make: object, model: object) -> str:
    """Make and model, the make once: `NIKON CORPORATION`, `NIKON D850` is `NIKON D850`."""
    make, model = (_text(value) for value in (make, model))
    first = make.split(" ")[0]
    return model if not make or model.lower().startswith(first.lower()) else f"{make} {model}".strip()


def _text(value: object) -> str:
    value = value.decode(errors="replace") if isinstance(value, bytes) else value
    return " ".join(value.replace("\0", " ").split())[:100] if isinstance(value, str) else ""


def _degrees(parts: Any, direction: object) -> float:
    degrees, minutes, seconds = (float(part) for part in parts)
    sign = -1.0 if _text(direction).upper()[:1] in ("S", "W") else 1.0
    return sign * (degrees + minutes / 60 + seconds / 3600)


def _position(latitude: float, longitude: float) -> Fields:
    """Nothing where it is none, nor at zero degrees of both, which is a receiver without a signal."""
    is_place = math.isfinite(latitude + longitude) and abs(latitude) <= 90 and abs(longitude) <= 180
    return {"latitude": round(latitude, 6), "longitude": round(longitude, 6)} if is_place and (latitude or longitude) else {}


def _place(image: Image.Image, exif: Image.Exif) -> Fields:
    """City and country, of XMP or else of IPTC."""
    xmp = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or exif.get(_XMP) or b""
    text = xmp if isinstance(xmp, str) else bytes(xmp[:_MAX_XMP]).decode(errors="replace")
    matches = [form.search(text[:_MAX_XMP]) for form in _XMP_PLACE]
    names = [html.unescape(match[1] or match[2]) if match else "" for match in matches]
    if not any(names) and image.format == "JPEG" and "photoshop" in image.info:
        iptc: Mapping[tuple[int, int], Any] = IptcImagePlugin.getiptcinfo(cast(ImageFile.ImageFile, image)) or {}
        names = [_text(iptc.get(tag)) for tag in (_CITY, _COUNTRY)]
    place = ", ".join(filter(None, map(_text, names)))
    return {"place": place} if place else {}
