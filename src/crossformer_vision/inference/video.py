"""Read and write videos frame by frame, through PyAV."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from PIL import Image

from crossformer_vision.errors import UserError, counted, missing_extra

if TYPE_CHECKING:
    from av.video.stream import VideoStream

log = logging.getLogger("crossformer_vision")

TICK = Fraction(1, 90_000)  # time base of written videos, in seconds
DEFAULT_RATE = 25.0  # frames per second if the file does not specify it
EXTENSIONS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}


def _import_av() -> ModuleType:
    try:
        import av
    except ModuleNotFoundError as error:
        raise missing_extra(error, "video") from None
    return av


def frames(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """Read a video. Damaged packets are skipped with a warning, as in video players.

    Args:
        path: Video file.

    Yields:
        Time in seconds and upright RGB image of each frame.

    Raises:
        UserError: If the file is not a video, no frame can be decoded, or PyAV is not installed.
    """
    av = _import_av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no video stream")
            decoded = damaged = 0
            for packet in container.demux(video=0):
                try:
                    packet_frames = packet.decode()
                except av.error.FFmpegError:
                    damaged += 1
                    continue
                for frame in packet_frames:
                    decoded += 1
                    image = frame.to_image()
                    rotation = getattr(frame, "rotation", 0)  # counterclockwise, of videos from phones
                    yield float(frame.time or 0), image.rotate(rotation, expand=True) if rotation else image
            if damaged and not decoded:
                raise UserError(f"{path}: no frame can be decoded. Is the file complete?")
            if damaged:
                log.warning("%s: %s skipped", path, counted(damaged, "damaged packet"))
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: cannot read this video ({error.strerror})") from None


def frame_rate(path: Path) -> float:
    """Frames per second of a video."""
    with _import_av().open(str(path)) as container:
        return float(container.streams.video[0].average_rate or DEFAULT_RATE)


@contextmanager
def mp4_writer(path: Path, fps: float) -> Iterator[Callable[[Image.Image, float], None]]:
    """Write an MP4 file.

    The video has the width and height of the first image. Other images keep their scale: taller ones, as with
    a longer legend, are cut at the bottom, and shorter ones are padded.

    Args:
        path: File to write.
        fps: Frames per second of the source.

    Yields:
        Function that appends an image at a time in seconds.
    """
    av = _import_av()
    with av.open(str(path), "w") as container:
        stream: VideoStream | None = None
        last = -1  # time of the last frame, in ticks

        def append(image: Image.Image, seconds: float) -> None:
            nonlocal stream, last
            if stream is None:
                stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height = (
                    side // 2 * 2 for side in image.size
                )  # yuv420p needs even sides
                stream.pix_fmt = "yuv420p"
                stream.codec_context.time_base = TICK
            if image.width != stream.width:
                height = max(1, round(image.height * stream.width / image.width))
                image = image.resize((stream.width, height))
            canvas = Image.new("RGB", (stream.width, stream.height), "white")
            canvas.paste(image, (0, 0))
            frame = av.VideoFrame.from_image(canvas)
            last = max(last + 1, round(seconds / TICK))  # times must increase
            frame.pts, frame.time_base = last, TICK
            container.mux(stream.encode(frame))

        yield append
        if stream is not None:
            container.mux(stream.encode(None))
