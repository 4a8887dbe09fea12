"""One progress bar for everything that takes longer than two seconds."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


class Bar:
    """What `progress` yields: ``advance`` moves it, ``update`` shows named values at its end."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar, self._task = bar, task

    def advance(self, n: float = 1) -> None:
        """Moves the bar by ``n`` units."""
        if self._bar is not None:
            self._bar.advance(self._task, n)

    def update(self, **info: object) -> None:
        """Shows ``name value`` pairs behind the bar; floats with four digits."""
        if self._bar is not None:
            shown = [
                f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in info.items()
            ]
            self._bar.update(self._task, info="  ".join(shown))


@contextlib.contextmanager
def progress(total: float, description: str, enabled: bool = True) -> Iterator[Bar]:
    """A bar of ``total`` units on standard error; with ``enabled=False`` the same object does nothing."""
    if not enabled:
        yield Bar()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        yield Bar(bar, bar.add_task(description, total=total, info=""))
