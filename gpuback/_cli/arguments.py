"""Turn what the user typed into what `gpuback` takes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any

from gpuback import schedules
from gpuback._cli import options as o
from gpuback._cli import show
from gpuback._training.history import Callback
from gpuback._training.optimizers import OPTIMIZERS, Optimizer
from gpuback.errors import MissingExtraError, OptionError, unknown_name

MAX_WIDTH = 2**24
"""Beyond it two layers need more memory than NumPy can count."""

SCHEDULES: dict[str, tuple[str, ...]] = {
    "constant": ("warmup",),
    "cosine": ("final", "warmup"),
    "step_decay": ("every", "factor", "warmup"),
}
"""The schedules by name, and their options."""


def widths(text: str, option: str) -> tuple[int, ...]:
    """Read the widths in "128,64"; none in "none"."""
    if text.strip().lower() == "none":
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and 0 < int(part) <= MAX_WIDTH for part in parts):
        raise OptionError(f"{option}: expected widths from 1 to {MAX_WIDTH:,}, such as 128,64, got {text!r}")
    return tuple(map(int, parts))


def names(text: str | None) -> str | list[str] | None:
    """Read the names in "relu,hard_tanh(low=-2, high=2)"; return "relu" itself."""
    found = re.split(r",(?![^()]*\))", text or "")
    return [name.strip() for name in found] if len(found) > 1 else text


def given(**options: Any) -> dict[str, Any]:
    """Drop the options that are None, so that the callee's defaults hold."""
    return {name: value for name, value in options.items() if value is not None}


def make_optimizer(
    name: str,
    learning_rate: float | None,
    momentum: float | None,
    nesterov: bool,
    weight_decay: float | None,
    no_decay_biases: bool,
) -> Optimizer:
    """Make the optimizer of that name; None stands for its own default.

    Raises:
        OptionError: an unknown name, a hyper-parameter that it does not have, or one that changes nothing.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    only_for_sgd = given(momentum=momentum, nesterov=nesterov or None)
    if only_for_sgd and name != "sgd":
        raise OptionError(f"--{next(iter(only_for_sgd))} goes with --optimizer sgd, not with {name}")
    if no_decay_biases and not (name == "adamw" if weight_decay is None else weight_decay):
        raise OptionError(
            "--no-decay-biases needs a weight decay above 0: give --weight-decay, or --optimizer adamw without it"
        )
    rate = o.LEARNING_RATES[name] if learning_rate is None else learning_rate
    return OPTIMIZERS[name](rate, **only_for_sgd, **given(weight_decay=weight_decay), decay_biases=not no_decay_biases)


def make_schedule(text: str | None, learning_rate: float, steps: int) -> schedules.Schedule | None:
    """Make the schedule in "cosine" or "step_decay(every=500, factor=0.5)"; None for no text.

    Args:
        text: what the user typed.
        learning_rate: where it begins, behind the warm-up.
        steps: of the whole run.
    """
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    name = found[1] if found else text
    if not found or name not in SCHEDULES:
        raise unknown_name("schedule", name, SCHEDULES)
    options: dict[str, float] = {}
    for part in filter(None, map(str.strip, (found[2] or "").split(","))):
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in SCHEDULES[name]:
            raise unknown_name(f"option of --schedule {name}", key, SCHEDULES[name])
        try:
            options[key] = int(value) if re.fullmatch(r"\d+", value) else float(value)
        except ValueError:
            raise OptionError(f"--schedule {name}: expected {key} to be a number, got {value!r}") from None
    warm: Any = options.pop("warmup", 0)
    rest: Any = options
    if name == "cosine":
        made = schedules.cosine(learning_rate, max(1, steps - warm), **rest)
    elif name == "step_decay":
        made = schedules.step_decay(learning_rate, **{"every": max(1, -(-steps // 3)), **rest})
    else:
        made = schedules.constant(learning_rate)
    return schedules.warmup(made, warm) if warm else made


def curve_file(plot: str | None, default: str, no_plot: bool, warn: Callable[[str], None]) -> str | None:
    """Return where to draw the learning curve; None for nowhere. Without matplotlib only who asked for it is refused.

    Raises:
        MissingExtraError, OptionError: the plot that was asked for cannot be drawn.
    """
    if no_plot:
        return None
    try:
        show.require_matplotlib(plot or default)
    except MissingExtraError as error:
        if plot is not None:
            raise
        warn(f"no learning curve is drawn: {error}")
        return None
    return plot or default


def require_checkpoint(checkpoint: str | None, resume: bool, overwrite: bool) -> None:
    """Raise OptionError if options about checkpoints contradict each other, or an earlier one would be lost."""
    for option, wanted in (("--resume", resume), ("--overwrite", overwrite)):
        if wanted and checkpoint is None:
            raise OptionError(f"{option} needs --checkpoint, the file to go on from")
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other: one goes on from the file, one begins anew")
    if checkpoint is not None and os.path.isfile(checkpoint) and not resume and not overwrite:
        raise OptionError(
            f"--checkpoint {checkpoint} holds an earlier run: --resume goes on from it, --overwrite replaces it"
        )


def tensorboard_logger(folder: str) -> Callback:
    """Make the callback that writes the run's curves.

    Raises:
        MissingExtraError: tensorboardX is not installed.
    """
    from gpuback.tensorboard import logger

    return logger(folder)
