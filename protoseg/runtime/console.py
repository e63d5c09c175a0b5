"""What commands show on a terminal."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TextColumn, track

T = TypeVar("T")


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    whole = int(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def plain_console() -> Console:
    """For tables: names with brackets and colons are shown as they are. 100 wide where it is no terminal."""
    console = Console(markup=False, emoji=False, highlight=False)
    return console if console.is_terminal else Console(width=100, markup=False, emoji=False, highlight=False)


def with_bar(items: Iterable[T], what: str, total: int, shown: bool = True) -> Iterable[T]:
    """The items, with a progress bar on a terminal until they end."""
    console = Console(stderr=True)
    hidden = not (shown and console.is_terminal)
    return track(items, escape(what), total, transient=True, console=console, disable=hidden)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar with rate and time left on a terminal: a function of (done, total or None)."""
    columns = (*Progress.get_default_columns(), TextColumn("{task.completed} {task.fields[rate]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, rate="")
        started = time.perf_counter()

        def show(done: int, total: int | None) -> None:
            rate = f"{done / max(time.perf_counter() - started, 1e-9):.1f}/s"
            bar.update(task, completed=done, total=total, rate=rate)

        yield show
