"""Videos, frame by frame, through PyAV."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from crossformer_vision.errors import UserError

EXTENSIONS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v"}


def _av() -> Any:
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'crossformer-vision[video]'") from None
    return av


def frames(path: Path) -> Iterator[tuple[float, Image.Image]]:
    """(seconds, RGB, upright) of each frame.

    Raises:
        UserError: a file that is no video, or is damaged; PyAV is not installed.
    """
    av = _av()
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path}: has no pictures")
            for frame in container.decode(video=0):
                picture = frame.to_image()
                turned = getattr(frame, "rotation", 0)  # of a phone held upright, counterclockwise
                yield float(frame.time or 0), picture.rotate(turned, expand=True) if turned else picture
    except av.error.FFmpegError as error:
        raise UserError(f"{path}: cannot read this video ({error.strerror})") from None


def rate(path: Path) -> float:
    """Frames a second."""
    with _av().open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 25)


@contextmanager
def written(path: Path, fps: float) -> Iterator[Any]:
    """A function that takes frames, all of the first one's size, and appends them to an MP4 file."""
    from fractions import Fraction

    av = _av()
    with av.open(str(path), "w") as container:
        stream: Any = None

        def append(picture: Image.Image) -> None:
            nonlocal stream
            if stream is None:
                stream = container.add_stream("h264", rate=Fraction(fps).limit_denominator(1001))
                stream.width, stream.height = (side // 2 * 2 for side in picture.size)  # as its colours need
                stream.pix_fmt = "yuv420p"
            frame = av.VideoFrame.from_image(picture.resize((stream.width, stream.height)))
            container.mux(stream.encode(frame))

        yield append
        if stream is not None:
            container.mux(stream.encode(None))
