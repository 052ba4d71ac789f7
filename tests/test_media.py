"""HEIC, AVIF, raw photographs, pages and frames as images and as items; what files say of when and where."""

from __future__ import annotations

import asyncio
import hashlib
import os
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fakes import FakeEncoder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiffs import encode

from benchmarks.files import dng, encrypted_pdf, exif, make, pdf, picture, saved, video
from traceir.collection.ingest import AddReport, add
from traceir.collection.sources import FILE_FIELD, STAT_FIELD, Failure, Source, find_sources, readable_suffixes, sources_of_file
from traceir.errors import ImageError
from traceir.images import ImageInput, ImageLimits
from traceir.index import open_index
from traceir.items import Item
from traceir.media import pdf as pdf_module
from traceir.media import raw
from traceir.media import video as video_module
from traceir.media.metadata import image_fields, video_fields
from traceir.media.part import file_of
from traceir.serve.uploads import LIMITS, UploadValidator, as_jpeg, image_in_folders, without_paths

TAKEN = {"date": "2024-05-17T18:03:21+02:00", "camera": "Apple iPhone 15 Pro", "latitude": 59.914, "longitude": 10.752}
SMALL, CLOCKWISE = (64, 48), Image.Transpose.ROTATE_270


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def distance(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    return float(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).mean())


def sources(path: Path) -> list[Source]:
    found = list(sources_of_file(path, path.name))
    assert all(isinstance(outcome, Source) for outcome in found), found
    return [outcome for outcome in found if isinstance(outcome, Source)]


def reason(path: Path) -> str:
    (failure,) = sources_of_file(path, path.name)
    assert isinstance(failure, Failure)
    return failure.reason


def added(folder: Path, *paths: Path) -> tuple[AddReport, FakeEncoder, dict[str, Any]]:
    encoder = FakeEncoder()
    with open_index(folder / "index", fingerprint="fake-1", prompt_version="p1", dim=16, create=True) as index:
        report = add(paths, index, encoder, progress=False)
        return report, encoder, {stored.id: stored for stored in index.scan()}


def turned(name: str) -> bytes:
    if name.endswith(".dng"):
        return dng(preview=picture(1, 960, 720), orientation=6)
    return saved(picture(1), {".heic": "HEIF", ".avif": "AVIF", ".jpg": "HEIF"}[Path(name).suffix], exif=exif(6))


@pytest.mark.parametrize("name", ["a.heic", "a.avif", "a.dng", "heic-called.jpg"])
def test_photographs_of_phones_and_cameras_are_upright_and_known_by_their_bytes(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, turned(name))
    image, size = ImageInput.open(path), (960, 720) if name == "a.dng" else (320, 240)
    upright = picture(1, *size).transpose(CLOCKWISE)
    assert distance(image.load(), upright) < 3 and image.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    (source,) = sources(path)
    item, _ = source.make_item()
    camera = {"date": "2023-12-24T17:00:00", "camera": "Fotowerk R1"} if name == "a.dng" else TAKEN
    kept = {FILE_FIELD: str(path), STAT_FIELD: item.fields[STAT_FIELD]}
    assert str(kept[STAT_FIELD]).startswith(f"{path.stat().st_size}:")
    assert dict(item.fields) == {
        **kept,
        **camera,
        "width": size[1],
        "height": size[0],
    }
    assert item.content_hash() == Item.of(image=path).content_hash() and path.suffix in readable_suffixes()
    assert distance(Image.open(BytesIO(as_jpeg(image_in_folders(str(path), [tmp_path], "1")))), upright) < 4
    data, format = image.encoded()
    assert distance(ImageInput.from_bytes(data).load(), upright) < 3 and (format.suffixes[0] == ".jpg") == (name == "a.dng")
    with pytest.raises(ImageError, match="limit of 100"):
        image.load(limits=ImageLimits(pixels=100))


def test_ten_bits_sequences_and_what_phones_append() -> None:
    import pillow_heif

    deep = pillow_heif.from_bytes("RGB;16", SMALL, (np.asarray(picture(1, *SMALL)).astype("<u2") * 257).tobytes())
    buffer = BytesIO()
    deep.save(buffer, quality=95)
    assert distance(ImageInput.from_bytes(buffer.getvalue()).load(), picture(1, *SMALL)) < 3
    for format in ("HEIF", "AVIF"):
        options: dict[str, Any] = {"save_all": True, "append_images": [picture(200, *SMALL)]}
        data = saved(picture(1, *SMALL), format, **(options if format == "AVIF" else {}))
        for trailer in (b"", b"\0\0\0\x10sefdSEFT\0\0\0\0", b"SEFT of a phone"):
            assert distance(ImageInput.from_bytes(data + trailer).load(), picture(1, *SMALL)) < 4
        for cut in (data[:-9], data[:300], data[:20]):
            with pytest.raises(ImageError, match=r"truncated|damaged"):
                ImageInput.from_bytes(cut).load()


def test_uploads_may_be_heic_and_not_raw() -> None:
    def check(data: bytes, limits: ImageLimits = LIMITS) -> ImageInput:
        return asyncio.run(UploadValidator(limits).check_bytes(data, "image"))

    for format in ("HEIF", "AVIF"):
        assert check(saved(picture(), format)).size() == (320, 240)
        with pytest.raises(ImageError, match="more than the limit of 76799"):
            check(saved(picture(), format), ImageLimits(pixels=76_799))
    with pytest.raises(ImageError, match=r"no TIFF of samples|damaged"):
        check(dng())
    with pytest.raises(ImageError, match="not an image"):
        check(video([picture(0, *SMALL)], seconds=1))


def test_raw_photographs_without_a_preview_are_developed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for data, size in ((dng(), (32, 24)), (dng(orientation=6), (24, 32)), (dng(preview=picture(1, 160, 120)), (32, 24))):
        assert ImageInput.open(write(tmp_path / "a.dng", data)).load().size == size
    assert ImageInput.open(write(tmp_path / "b.cr3", encode(picture(), "JPEG"))).load().size == (320, 240)
    for bad, why in ((dng()[:300], "damaged"), (b"words", "LibRaw"), (b"", "empty")):
        with pytest.raises(ImageError, match=why):
            ImageInput.open(write(tmp_path / "bad.nef", bad)).load()
    with pytest.raises(ImageError, match=r"a\.dng is 64 x 48 pixels, too many"):
        ImageInput.open(write(tmp_path / "a.dng", dng())).load(limits=ImageLimits(pixels=1000))
    monkeypatch.setattr(raw, "LEAST_SIDE", 100)
    assert ImageInput.open(write(tmp_path / "c.dng", dng(preview=picture(1, 160, 120)))).load().size == (160, 120)


@pytest.mark.parametrize(
    ("module", "name", "data"),
    [
        ("pillow_heif", "a.heic", saved(picture(0, *SMALL), "HEIF")),
        ("rawpy", "a.dng", dng()),
        ("pypdfium2", "a.pdf", pdf("words")),
        ("av", "a.mp4", b"any"),
    ],
)
def test_a_file_whose_package_is_missing_says_how_to_install_it(
    module: str, name: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for known in [known for known in sys.modules if known.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, known)
    monkeypatch.setitem(sys.modules, module, None)
    if module == "pillow_heif":
        with pytest.raises(ImageError, match="HEIC needs the package pillow-heif; send it as JPEG or PNG"):
            asyncio.run(UploadValidator().check_bytes(data, "image"))
    report, _, stored = added(tmp_path, write(tmp_path / name, data), write(tmp_path / "b.jpg", encode(picture(), "JPEG")))
    assert list(stored) == ["b.jpg"] and "pip install 'traceir[files]'" in report.failed[0].reason


def test_each_page_of_a_document_is_an_item_with_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "paper.pdf", pdf("Invoice 117\nfor a red bicycle", picture(7), None, title="Invoice"))
    report, _, stored = added(tmp_path, path)
    assert list(stored) == [f"paper.pdf#page={page}" for page in (1, 2, 3)] and report.failed == []
    first = stored["paper.pdf#page=1"]
    assert first.modality == "image,text" and str(first.text).split() == "Invoice 117 for a red bicycle".split()
    assert [stored[id].modality for id in list(stored)[1:]] == ["image", "image"]
    known = {FILE_FIELD: str(path), STAT_FIELD: "", "title": "Invoice", "date": "2024-02-29T12:00:00+01:00", "pages": 3}
    assert dict(first.fields) == {**known, "page": 1} and first.image == f"{path}#page=1"
    page = ImageInput.open(f"{path}#page=2")
    width, height = page.size()
    assert (
        page.load().size == (width, height) and 1_400_000 < width * height < 1_600_000 and min(page.load(100).size) in (100, 101)
    )
    assert distance(page.load(), picture(7).resize((width, height))) < 4 and page.load() == page.load()
    assert page.encoded()[1].media_type == "image/jpeg" and page != ImageInput.open(f"{path}#page=3")
    with monkeypatch.context() as patch:
        patch.setattr(pdf_module, "draw_page", lambda *_: pytest.fail("drawn"))
        assert added(tmp_path, path)[0].skipped == 3
    with pytest.raises(ImageError, match="has 3 pages, not 4"):
        ImageInput.open(f"{path}#page=4").load()
    write(path, pdf("Other words"))
    os.utime(path, ns=(1, 1))
    with pytest.raises(ImageError, match="changed while in use"):
        (page.sha256, page.load())


def test_documents_that_cannot_be_read_and_pages_of_odd_sizes(tmp_path: Path) -> None:
    whole = pdf("words")
    for data, why in ((encrypted_pdf(), "encrypted"), (whole[:200], "damaged"), (pdf(), "no pages"), (b"", "empty")):
        assert why in reason(write(tmp_path / "bad.pdf", data))
    os.mkfifo(tmp_path / "pipe.pdf")
    assert "not a regular file" in reason(tmp_path / "pipe.pdf") and "does not exist" in reason(tmp_path / "none.pdf")
    poster = write(tmp_path / "poster.pdf", pdf("A poster", size=(14_400, 14_400)))
    assert ImageInput.open(f"{poster}#page=1").load().size == (1225, 1225)
    ribbon = ImageInput.open(f"{write(tmp_path / 'ribbon.pdf', pdf('A ribbon', size=(14_400, 20)))}#page=1")
    with pytest.raises(ImageError, match="14400 x 20 points"):
        ribbon.load()
    (source,) = sources(tmp_path / "ribbon.pdf")
    item, notes = source.without_image(ImageError("too narrow"))
    assert item.modality == "text" and "its text alone" in notes[0].what


def test_a_video_is_an_item_for_each_scene(tmp_path: Path) -> None:
    scenes = [picture(seed, *SMALL) for seed in (5, 60, 150)]
    data = video([scenes[0], *scenes], creation_time="2024-05-17T16:03:21Z", location="+59.9140+010.7520/")
    path = write(tmp_path / "clip.mp4", data)
    _, _, stored = added(tmp_path, path)
    assert list(stored) == ["clip.mp4#t=0", "clip.mp4#t=12", "clip.mp4#t=18"]  # the second scene is the first
    for scene, (id, second) in zip(scenes, (("clip.mp4#t=0", 0), ("clip.mp4#t=12", 12), ("clip.mp4#t=18", 18)), strict=True):
        assert distance(ImageInput.open(stored[id].image).load(), scene) < 6
        assert dict(stored[id].fields) == {
            **{FILE_FIELD: str(path), STAT_FIELD: "", "date": "2024-05-17T16:03:21+00:00"},
            **{"latitude": 59.914, "longitude": 10.752},
            **{"width": 64, "height": 48, "second": second},
        }
    assert distance(ImageInput.open(f"{path}#t=13.3").load(), scenes[1]) < 6
    assert ImageInput.open(f"{path}#t=13").sha256 != ImageInput.open(f"{path}#t=12").sha256


@pytest.mark.parametrize(
    ("name", "options"), [("a.mov", {"rotation": 90}), ("a.webm", {"codec": "libvpx", "rate": 2}), ("a.mkv", {})]
)
def test_videos_of_other_kinds_are_upright(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    format = {"mkv": "matroska"}.get(name[2:], name[2:])
    scenes = [picture(seed, *SMALL) for seed in (5, 150)]
    upright = [scene.transpose(CLOCKWISE) if "rotation" in options else scene for scene in scenes]
    items = [source.make_item()[0] for source in sources(write(tmp_path / name, video(scenes, format, **options)))]
    assert [item.id for item in items] == [f"{name}#t=0", f"{name}#t=6"]
    for item, scene in zip(items, upright, strict=True):
        assert (item.fields["width"], item.fields["height"]) == scene.size and distance(item.images[0].load(), scene) < 8


def test_a_long_video_has_frames_further_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "long.mp4", video([picture(seed * 30, *SMALL) for seed in range(8)], seconds=6, rate=2))
    monkeypatch.setattr(video_module, "MOST_FRAMES", 4)
    seconds = video_module.read_video(path).seconds
    assert len(seconds) <= 4 and seconds[0] == 0 and min(np.diff(seconds)) >= 12
    assert seconds[-1] >= 30


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    import av

    secret = write(tmp_path / "secret.mts", video([picture(0, *SMALL)], "mpegts", seconds=1))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n"
    sound = BytesIO()
    with av.open(sound, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode(None)])
    for data, why in ((b"words", "no video"), (b"", "empty"), (playlist.encode(), "no video"), (sound.getvalue(), "no pictures")):
        assert why in reason(write(tmp_path / "bad.mp4", data))
    os.mkfifo(tmp_path / "pipe.mov")
    assert reason(tmp_path / "pipe.mov").startswith("it is not a regular file")
    assert [source.id for source in sources(secret)] == ["secret.mts#t=0"]  # its own clock starts at 1.4 s


def test_a_server_shows_pages_and_frames_only_of_its_folders_and_names_no_path(tmp_path: Path) -> None:
    path = write(tmp_path / "in" / "paper.pdf", pdf("words"))
    write(tmp_path / "out.pdf", pdf("words"))
    shown = image_in_folders(f"{path}#page=1", [path.parent], "1")
    assert Image.open(BytesIO(as_jpeg(shown, 64))).height == 64
    for outside in (f"{tmp_path / 'out.pdf'}#page=1", f"{path.parent}/../out.pdf#page=1"):
        with pytest.raises(Exception, match="not among"):
            image_in_folders(outside, [path.parent], "1")
    missing = image_in_folders(f"{path}#page=9", [path.parent], "1")
    with pytest.raises(ImageError) as caught, without_paths([missing]):
        as_jpeg(missing)
    assert str(tmp_path) not in str(caught.value) and "has 1 pages" in str(caught.value)


def test_a_name_is_that_of_a_part_only_where_its_file_is_of_that_kind(tmp_path: Path) -> None:
    for name in ("a.pdf#page=12", "b/C.PDF#page=1", "a.mp4#t=0", "two\nlines.mov#t=12.125"):
        assert file_of(name) == name.rpartition("#")[0]
    for name in ("a.pdf", "a.jpg#page=1", "a.pdf#t=1", "a.mp4#page=1", "a.pdf#page=0", "a.pdf#page=-1", "a.mp4#t=1e3", "#page=1"):
        assert file_of(name) == name
    for name in ("a.pdf", "a.mp4"):
        with pytest.raises(ImageError, match="name a page or second of it"):
            ImageInput.open(write(tmp_path / name, b"any")).load()
    (tmp_path / "own.jpg").symlink_to("own.jpg")
    (source,) = sources(tmp_path / "own.jpg")
    with pytest.raises(ImageError, match="cannot be read"):
        source.make_item()


def iptc(**texts: str) -> bytes:
    """A JPEG's segment of city and country as agencies write them."""
    numbers = {"city": 90, "country": 101}
    records = b"".join(bytes((0x1C, 2, numbers[name], 0, len(text))) + text.encode() for name, text in texts.items())
    block = b"Photoshop 3.0\08BIM\x04\x04\0\0" + len(records).to_bytes(4, "big") + records + b"\0" * (len(records) % 2)
    return b"\xff\xed" + (len(block) + 2).to_bytes(2, "big") + block


def fields_of(**changes: Any) -> dict[str, Any]:
    """Of a JPEG with these tags: `t0x0110`, of EXIF `e0x9003`, of GPS `g1`."""
    made = Image.Exif()
    for name, value in changes.items():
        place = {"t": made, "e": made.get_ifd(0x8769), "g": made.get_ifd(0x8825)}[name[0]]
        place[int(name[1:], 0)] = value
    image = Image.open(BytesIO(encode(Image.new("RGB", (4, 2)), "JPEG", exif=made.tobytes())))
    return {name: value for name, value in image_fields(image).items() if name not in ("width", "height")}


def test_dates_cameras_and_places_are_read_with_sense() -> None:
    taken = "2024:05:17 18:03:21"
    assert fields_of(e0x9003=taken, t0x0132="2020:01:01 00:00:00") == {"date": "2024-05-17T18:03:21"}
    assert fields_of(t0x0132=taken, e0x9010="-03:30", e0x9011="+09:00") == {"date": "2024-05-17T18:03:21-03:30"}
    assert fields_of(e0x9003="0000:00:00 00:00:00", e0x9004="2024:05:17 18:03:21\0") == {"date": "2024-05-17T18:03:21"}
    for wrong in ("2024:13:01 00:00:00", "yesterday", "    :  :     :  :  ", "2024:05:17"):
        assert fields_of(e0x9003=wrong, e0x9011="+99:00") == {}
    assert fields_of(t0x010F="NIKON CORPORATION", t0x0110="NIKON D850 ") == {"camera": "NIKON D850"}
    assert fields_of(t0x010F="Canon", t0x0110="") == {"camera": "Canon"} and fields_of(t0x010F="   ") == {}
    south = {"g1": "S", "g2": (33.0, 51.0, 25.2), "g3": "W", "g4": (151.0, 12.0, 0.0)}
    assert fields_of(**south) == {"latitude": -33.857, "longitude": -151.2}
    for nowhere in ({"g2": (0.0, 0.0, 0.0), "g4": (0.0, 0.0, 0.0)}, {"g2": (95.0, 0.0, 0.0)}, {"g4": (200.0, 0.0, 0.0)}):
        assert fields_of(**{**south, **nowhere}) == {}
    xmp = b'<rdf:Description photoshop:City="Troms\xc3\xb8 &amp; Oslo"><photoshop:Country>Norway</photoshop:Country>'
    data = encode(Image.new("RGB", (4, 2)), "JPEG", xmp=xmp)
    assert image_fields(Image.open(BytesIO(data)))["place"] == "Tromsø & Oslo, Norway"
    plain = encode(Image.new("RGB", (4, 2)), "JPEG")
    old = Image.open(BytesIO(plain[:2] + iptc(city="Bergen", country="Norway") + plain[2:]))
    assert image_fields(old)["place"] == "Bergen, Norway"
    assert image_fields(Image.open(BytesIO(encode(Image.new("RGB", (4, 2)), "PNG")))) == {"width": 4, "height": 2}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_sides_are_those_of_the_image_as_it_is_shown(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = ImageInput.from_bytes(encode(Image.new("RGB", (4, 2)), kind, exif=exif))
    assert (image.metadata(), image.load().size) == ({"width": 2, "height": 4}, (2, 4))


def test_videos_say_when_and_where_as_phones_write_it() -> None:
    apple = {
        "creationdate": "2024-05-17T18:03:21+0200",
        "location.ISO6709": "-33.8570+151.2000+010/",
        "make": "Apple",
        "model": "X",
    }
    stated = {f"com.apple.quicktime.{name}": value for name, value in apple.items()}
    where = {"latitude": -33.857, "longitude": 151.2}
    assert video_fields({**stated, "creation_time": "2020"}) == {
        "date": "2024-05-17T18:03:21+02:00",
        "camera": "Apple X",
        **where,
    }
    assert video_fields({"creation_time": "2024-05-17T16:03:21.000000Z"}) == {"date": "2024-05-17T16:03:21+00:00"}
    for junk in ({"creation_time": "1904-01-01T00:00:00Z"}, {"creation_time": "2024-99-01T00:00:00Z"}, {"location": "+0+0/"}):
        assert video_fields(junk) == {}


SHOT = saved(picture(1, *SMALL), "JPEG", exif=exif(6), xmp=b'photoshop:City="Oslo"')


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=60, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(2, 900), st.integers(0, 255)), max_size=12))
def test_damaged_metadata_is_left_out_and_never_an_error(flips: list[tuple[int, int]]) -> None:
    data = bytearray(SHOT)
    for position, value in flips:
        data[position] = value
    fields = ImageInput.from_bytes(bytes(data)).metadata()
    assert all(isinstance(value, str | int | float) for value in fields.values())


@pytest.mark.slow
def test_a_folder_of_every_kind_of_file_is_read_or_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    make(folder)
    report, _, stored = added(tmp_path, folder)
    failed = {Path(failure.location.strip("'")).name for failure in report.failed}
    bad = {path.name for path in (folder / "damaged").iterdir()} | {
        "DSC_0003.NEF",
        "secret.pdf",
        "broken-link.jpg",
        "own-link.jpg",
        "pipe.jpg",
    }
    rights = {"no-rights.jpg"} if os.geteuid() else set()
    bad |= {"pipe.mp4", "latin.txt", "wide.txt", "blank.txt", *rights}
    assert {name for name in failed if "caf" not in name} == bad
    assert len(stored) > 40 and {Path(stored.fields[FILE_FIELD]).name for stored in stored.values()}.isdisjoint(bad)
    (note,) = [note for note in report.notes if note.location == str(folder)]
    for kind in (
        "1 .docx",
        "1 .xlsx",
        "1 .zip",
        "1 .m4a",
        "1 .db",
        "1 linked folder",
        "save documents as .pdf",
        "unpack archives",
    ):
        assert kind in note.what
    assert not [path for path in find_sources([folder]) if isinstance(path, Source) and "stock" in path.id]
