"""Ctrl-C and SIGTERM: the step in hand ends, a checkpoint is written, the exit code tells."""

import signal
from types import FrameType
from typing import Any


class Interrupted(Exception):
    """Ctrl-C or SIGTERM came; the checkpoint is written. `signal` is its number."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class StopSignals:
    """Remembers the first Ctrl-C or SIGTERM, so that the step in hand can end; the second one kills."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, *_: object) -> None:
        self._restore()
