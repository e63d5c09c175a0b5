"""Videos and webcams through PyAV, FFmpeg's Python binding; optional: pip install "protoseg[video]".

PyAV is chosen since its wheels bring FFmpeg with them, it reads webcams and it writes H.264, which browsers
play.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from protoseg.runtime.errors import UserError
from protoseg.runtime.extras import import_extra
from protoseg.runtime.files import cannot_write, whole_file

VIDEO_ENDINGS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
WEBCAM_RATE = Fraction(15)  # frames/s of the written video where the camera does not say


def read_frames(source: str) -> tuple[Fraction, Iterator[Tensor]]:
    """Frames/s, and the frames (3, H, W) uint8 of a video file or of the webcam of that number.

    Errors: UserError if it cannot be opened, and while iterating if it is damaged.
    """
    av = pyav(source)
    try:
        container = _open_webcam(av, int(source)) if source.isdecimal() else av.open(source)
    except (av.FFmpegError, OSError) as error:
        reason = error.strerror or error
        if source.isdecimal():
            raise UserError(f"webcam {source}: cannot open it ({reason}); is a camera connected?") from None
        raise UserError(f"{source}: cannot open this video ({reason}); check it") from None
    if not container.streams.video:
        container.close()
        raise UserError(f"{source}: no pictures in this file; give a video")
    rate = container.streams.video[0].average_rate or WEBCAM_RATE
    return Fraction(rate).limit_denominator(60000), _frames(av, container, source)


class VideoWriter:
    """An H.264 file of equally large pictures, under its own name once it is whole."""

    def __init__(self, path: Path, rate: Fraction) -> None:
        self.path, self.rate = path, rate
        self.container: Any = None  # opened with the first picture: only that tells the size
        self.whole = ExitStack()

    def __enter__(self) -> "VideoWriter":
        return self

    def add(self, picture: NDArray[np.uint8]) -> None:
        """Append one picture (H, W, 3); H.264 wants even sides, so an odd last row or column is repeated."""
        av = pyav(str(self.path))
        even = np.pad(picture, ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)), mode="edge")
        try:
            if self.container is None:
                part = self.whole.enter_context(whole_file(self.path))
                self.container = av.open(str(part), "w", format="mp4")
                self.stream = self.container.add_stream("libx264", rate=self.rate)
                self.stream.height, self.stream.width = even.shape[:2]
                self.stream.pix_fmt = "yuv420p"
            self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        except (av.FFmpegError, OSError) as error:
            raise cannot_write(self.path, error) from None

    def __exit__(self, *_: object) -> None:
        if self.container is not None:
            self.container.mux(self.stream.encode())
            self.container.close()
            self.whole.close()


def _frames(av: ModuleType, container: Any, source: str) -> Iterator[Tensor]:
    with container:
        try:
            for frame in container.decode(video=0):
                # Telephones store every video lying and say how to turn it, in degrees against the clock.
                upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                yield torch.from_numpy(upright.transpose(2, 0, 1).copy())
        except av.FFmpegError as error:
            raise UserError(f"{source}: damaged video ({error.strerror}); its first part was used") from None


def _open_webcam(av: ModuleType, number: int) -> Any:
    if sys.platform == "darwin":
        return av.open(str(number), format="avfoundation", container_options={"framerate": "30"})
    return av.open(f"/dev/video{number}", format="v4l2")


def pyav(source: str) -> Any:
    """The library. Errors: UserError if it is missing, naming what needs it."""
    return import_extra("av", "protoseg[video]", f"{source}: for videos, ")
