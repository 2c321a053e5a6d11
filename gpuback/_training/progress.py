"""A progress bar for `fit`, by rich, on stderr."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from gpuback._core.streams import Stream, is_terminal
from gpuback.errors import missing_extra

SECONDS_BETWEEN_LOSSES = 0.1
"""How often the displayed loss is updated."""


@contextlib.contextmanager
def progress_bar(wanted: bool | None, total: int | None, done: int) -> Iterator[Callable[[Any], None]]:
    """Yield a function to call with the loss after each step.

    Args:
        wanted: True, False, or None for "on a terminal where rich is installed".
        total, done: steps in all, None if nobody knows, and already made.

    Raises:
        MissingExtraError: wanted is True and rich is not installed.
    """
    if wanted is False or (wanted is None and not is_terminal(sys.stderr)):
        yield _ignore
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:
        if wanted:
            raise missing_extra("rich", "progress=True", "cli") from None
        yield _ignore
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    console = Console(file=Stream(sys.stderr))  # type: ignore[arg-type]
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=total, completed=done, loss="")

        next_loss = 0.0

        def advance(loss: Any) -> None:
            nonlocal next_loss
            bar.update(task, advance=1)
            if time.monotonic() >= next_loss:  # reading a loss waits for the GPU
                bar.update(task, loss=f"loss {float(loss):.4g}")
                next_loss = time.monotonic() + SECONDS_BETWEEN_LOSSES

        yield advance


def _ignore(loss: Any) -> None:
    return None
