"""Run the command `gpuback`. Each error becomes one line on stderr and an exit code."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from gpuback._cli import BROKEN_PIPE, FAILED, INTERRUPTED, USAGE
from gpuback._core.streams import standard_streams
from gpuback._text import shown
from gpuback.errors import DivergedError, GpubackError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name; by default, what the user typed.

    Returns:
        The exit code: 0, 1 (a check failed, training diverged), 2 (bad usage or input), 130 (interrupted) or 141
        (the program that reads the output has stopped).
    """
    with standard_streams() as stdout, warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        code = _guarded(sys.argv[1:] if arguments is None else list(arguments))
        stdout.flush()
        if stdout.failure is None:
            return code
        if isinstance(stdout.failure, BrokenPipeError):
            return BROKEN_PIPE
        return _complain(f"stdout: {stdout.failure.strerror}", USAGE)


def _guarded(arguments: list[str]) -> int:
    try:
        return _run(arguments)
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except DivergedError as error:
        return _complain(error, FAILED)
    except MemoryError as error:
        return _complain(f"not enough memory: {error}", USAGE)
    except (GpubackError, OSError, Warning) as error:  # a warning that PYTHONWARNINGS turned into an error
        return _complain(error, USAGE)


def _run(arguments: list[str]) -> int:
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        needs = f"gpuback's command line needs typer and rich, and {error.name} is not installed"
        return _complain(f"{needs}: pip install '.[cli]' in gpuback's source tree", USAGE)
    from gpuback._cli.app import app

    # click's UsageError moved when typer absorbed click. It is BadParameter's parent in every version.
    usage_error: Any = typer.BadParameter.__mro__[1]
    try:
        work = typer.main.get_command(app)(arguments or ["--help"], prog_name="gpuback", standalone_mode=False)
    except usage_error as error:
        command = "gpuback" if error.ctx is None else error.ctx.command_path
        return _complain(f"{error.format_message()} (see {command} --help)", USAGE)
    # A command returns the work to do. --help and --version have run already and return an exit code.
    return int((work() if callable(work) else work) or 0)


def _complain(problem: object, code: int) -> int:
    """Print the one line, and the notes below it, and return the code."""
    message = " ".join(str(problem).split())
    if isinstance(problem, OSError) and problem.strerror:
        message = f"{os.fsdecode(problem.filename)}: {problem.strerror}" if problem.filename else problem.strerror
    print(f"gpuback: {shown(message)}", *getattr(problem, "__notes__", ()), sep="\n", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *place: object) -> None:
    """Print a warning as one line, without the place in gpuback's sources."""
    _complain(message, 0)
