"""Keyframes of videos, by PyAV: few of each scene, found by reading the file once, and decoded one at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from traceir.errors import ImageError
from traceir.media.file import Version, package, readable, version_of
from traceir.media.metadata import video_fields

SUFFIXES: Final = frozenset(".3g2 .3gp .avi .flv .m2ts .m4v .mkv .mov .mp4 .mpeg .mpg .mts .ogv .webm .wmv".split())
LEAST_STEP: Final = 5.0
"""Seconds between two keyframes that are taken, at least."""
MOST_FRAMES: Final = 200
"""Keyframes of one video, at most: a longer one has them further apart."""
SAME: Final = 4.0
"""Mean difference of grey levels (of 255) between two keyframes, shrunk to 16 x 16, below which the second one is left out."""
_FORMATS: Final = "mov,mp4,matroska,webm,avi,asf,flv,mpegts,mpeg,ogg,mpegvideo,m4v,h264,hevc"
"""No playlists (HLS, concat and their like), which would open other files and addresses."""
MAX_PIXELS: Final = 64_000_000
_SLACK: Final = 0.0006
"""Seconds, since times are named to the millisecond."""


@dataclass(frozen=True, slots=True)
class VideoFrames:
    """Seconds of the keyframes that stand for the video, and what it says of itself."""

    seconds: tuple[float, ...]
    fields: Mapping[str, str | int | float] = field(default_factory=dict)


def read_video(path: Path) -> VideoFrames:
    """Raises ImageError for a file that is damaged or has no pictures. The last videos are remembered while unchanged."""
    return _read_video(path, version_of(path))


@lru_cache(maxsize=1024)
def _read_video(path: Path, version: Version) -> VideoFrames:
    with _opened(path) as (container, stream):
        stream.codec_context.skip_frame = "NONKEY"
        step = max(LEAST_STEP, float(container.duration or 0) / 1e6 / MOST_FRAMES)
        seconds: list[float] = []
        shown: npt.NDArray[np.int16] | None = None
        fields: dict[str, str | int | float] = {}
        for frame, second in _frames(container, stream):
            if seconds and second < seconds[-1] + step:
                continue
            if not fields:
                width, height = _upright_size(frame)
                fields = {**video_fields({**stream.metadata, **container.metadata}), "width": width, "height": height}
            small = np.asarray(frame.reformat(16, 16, "gray").to_ndarray(), dtype=np.int16)
            if shown is not None and np.abs(small - shown).mean() < SAME:
                continue
            seconds, shown = [*seconds, max(0.0, second)], small
            if len(seconds) > MOST_FRAMES:
                step *= 2
                seconds = _thinned(seconds, step)
    if not seconds:
        raise ImageError(f"{path} holds no picture that can be decoded; save it anew, or remove it")
    return VideoFrames(tuple(seconds), fields)


def draw_frame(path: Path, second: float, pixels: int) -> Image.Image:
    """The upright frame that is shown at that second, as RGB."""
    for earlier in (0.0, 10.0, math.inf):  # seconds, since some containers are not sought exactly
        with _opened(path, pixels) as (container, stream):
            if second > earlier:
                container.seek(int((second + _start_of(stream) - earlier + _SLACK) / stream.time_base), stream=stream)
            frame = _frame_at(container, stream, second)
            if frame is not None:
                image: Image.Image = frame.to_image()
                return image.rotate(frame.rotation, expand=True) if frame.rotation else image
    raise ImageError(f"{path} has no picture at {second:g} seconds; add it anew")


def frame_size(path: Path) -> tuple[int, int]:
    """Width and height of the frames as the header says, whatever their rotation."""
    with _opened(path) as (_, stream):
        return stream.width, stream.height


def _frame_at(container: Any, stream: Any, second: float) -> Any:
    """The last frame that starts by then; None where the first one that is read starts later."""
    last = None
    for frame, shown_at in _frames(container, stream):
        if shown_at > second + _SLACK:
            break
        last = frame
        if shown_at >= second - _SLACK:
            break
    return last


def _thinned(seconds: list[float], step: float) -> list[float]:
    kept = seconds[:1]
    for second in seconds[1:]:
        if second >= kept[-1] + step:
            kept.append(second)
    return kept


def _upright_size(frame: Any) -> tuple[int, int]:
    return (frame.height, frame.width) if frame.rotation % 180 else (frame.width, frame.height)


def _start_of(stream: Any) -> float:
    """Seconds that the stream's own clock shows at its first frame."""
    return float((stream.start_time or 0) * stream.time_base)


def _frames(container: Any, stream: Any) -> Iterator[tuple[Any, float]]:
    """Frames that can be decoded, and when they are shown, in seconds from the start; damaged packets are passed over, and a
    file that breaks off ends there."""
    av = package("av", "a video")
    only_keys = stream.codec_context.skip_frame == "NONKEY"
    packets, start = container.demux(stream), _start_of(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:
            return
        if packet is None:
            return
        if only_keys and packet.size and not packet.is_keyframe:
            continue
        with contextlib.suppress(av.FFmpegError):
            yield from ((frame, float(frame.time) - start) for frame in packet.decode() if frame.time is not None)


@contextlib.contextmanager
def _opened(path: Path, pixels: int = MAX_PIXELS) -> Iterator[tuple[Any, Any]]:
    """The container and its first stream of pictures; ImageError where there is none, or of more than `pixels`."""
    version_of(path)
    av = package("av", f"{path}")
    with readable(path), path.open("rb") as file:
        try:
            with av.open(file, options={"format_whitelist": _FORMATS}, metadata_errors="replace") as container:
                stream = next((stream for stream in container.streams.video if stream.codec_context is not None), None)
                if stream is None:
                    raise ImageError(f"{path} holds no pictures that can be decoded; only these are read of videos")
                if stream.width * stream.height > pixels:
                    raise ImageError(
                        f"{path} has {stream.width} x {stream.height} pixels, more than the limit of {pixels}; shrink it"
                    )
                yield container, stream
        except ImageError:
            raise
        except (av.FFmpegError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            raise ImageError(
                f"{path} is no video that can be read: {getattr(error, 'strerror', None) or error}; save it anew"
            ) from error
