"""Videos, frame by frame, through PyAV."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

from crossformer_vision.errors import UserError, counted

log = logging.getLogger("crossformer_vision")

TICK = Fraction(1, 90_000)  # seconds; the unit of times in videos
EXTENSIONS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[video]'") from None
    return av


def frames(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """Time in seconds and upright RGB picture of each frame.

    Damaged packets are left out with a warning, as players do.

    Raises:
        UserError: If the file is no video, none of it can be decoded, or PyAV is not installed.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no pictures")
            decoded = damaged = 0
            for packet in container.demux(video=0):
                try:
                    found = packet.decode()
                except av.error.FFmpegError:
                    damaged += 1
                    continue
                for frame in found:
                    decoded += 1
                    picture = frame.to_image()
                    turned = getattr(frame, "rotation", 0)  # of a phone held upright, counterclockwise
                    yield float(frame.time or 0), picture.rotate(turned, expand=True) if turned else picture
            if damaged and not decoded:
                raise UserError(f"{path}: none of its frames can be decoded. Is the file complete?")
            if damaged:
                log.warning("%s: %s left out", path, counted(damaged, "damaged packet"))
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: cannot read this video ({error.strerror})") from None


def rate(path: Path) -> float:
    """Frames a second."""
    with _av().open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 25)


@contextmanager
def written(path: Path, fps: float) -> Iterator[Any]:
    """A function that appends pictures with their times in seconds to an MP4 file.

    The video has the width and height of the first picture. Others keep their scale: what is taller is cut
    off at the bottom, where a legend is, and what is shorter is padded.

    Args:
        path: The file.
        fps: Frames a second of the source.
    """
    av = _av()
    with av.open(str(path), "w") as container:
        stream: Any = None
        last = -1  # time of the last frame, in ticks

        def append(picture: Image.Image, seconds: float) -> None:
            nonlocal stream, last
            if stream is None:
                stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height = (side // 2 * 2 for side in picture.size)  # as its colours need
                stream.pix_fmt = "yuv420p"
                stream.codec_context.time_base = TICK
            if picture.width != stream.width:
                height = max(1, round(picture.height * stream.width / picture.width))
                picture = picture.resize((stream.width, height))
            canvas = Image.new("RGB", (stream.width, stream.height), "white")
            canvas.paste(picture, (0, 0))
            frame = av.VideoFrame.from_image(canvas)
            last = max(last + 1, round(seconds / TICK))  # times only rise
            frame.pts, frame.time_base = last, TICK
            container.mux(stream.encode(frame))

        yield append
        if stream is not None:
            container.mux(stream.encode(None))
