"""Run the command `gpuback`. Each error becomes one line on stderr and an exit code."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from gpuback import _interrupted_start
from gpuback._cli import BROKEN_PIPE, FAILED, INTERRUPTED, USAGE
from gpuback._cli.words import in_options, nearest_option
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
        code = _guarded(arguments)
        stdout.flush()
        if stdout.failure is None:
            return code
        if isinstance(stdout.failure, BrokenPipeError):
            return BROKEN_PIPE
        return _complain(f"stdout: {stdout.failure.strerror}", USAGE)


def _guarded(arguments: Sequence[str] | None) -> int:
    try:
        _interrupted_start.end()
        return _run(sys.argv[1:] if arguments is None else list(arguments), typed=arguments is None)
    except BrokenPipeError:
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return _complain("interrupted", INTERRUPTED)
    except MemoryError as error:
        return _complain(f"not enough memory: {error}", USAGE)
    except (GpubackError, OSError, Warning) as error:  # a warning that PYTHONWARNINGS turned into an error
        return _complain(error, USAGE)


def _run(arguments: list[str], typed: bool) -> int:
    try:
        import rich  # noqa: F401
        import typer
    except ImportError as error:
        needs = f"gpuback's command line needs typer and rich, and {error.name} is not installed"
        return _complain(f"{needs}: pip install '.[cli]' in gpuback's source tree", USAGE)
    from gpuback._cli import blas_kernels
    from gpuback._cli.app import app

    blas_kernels.may_restart = typed
    # click's UsageError moved when typer absorbed click. It is BadParameter's parent in every version.
    usage_error: Any = typer.BadParameter.__mro__[1]
    commands: Any = typer.main.get_command(app)
    try:
        work = commands(arguments or ["--help"], prog_name="gpuback", standalone_mode=False)
    except usage_error as error:
        command = "gpuback" if error.ctx is None else error.ctx.command_path
        unknown, hint = getattr(error, "option_name", None), ""
        if unknown is not None and error.ctx is not None:
            hint = nearest_option(unknown, [name for option in error.ctx.command.params for name in option.opts])
            error.possibilities = None if hint else error.possibilities
        return _complain(f"{error.format_message()}{hint} (see {command} --help)", USAGE)
    if work == INTERRUPTED:  # in the midst of parsing, where Typer says no more than that
        raise KeyboardInterrupt
    if not callable(work):  # --help and --version have run already and return an exit code
        return int(work or 0)
    parameters = commands.commands[work.func.__name__].params
    options = {parameter.name: max(parameter.opts, key=len) for parameter in parameters}
    try:
        return int(work() or 0)
    except GpubackError as error:
        code = FAILED if isinstance(error, DivergedError) else USAGE
        return _complain(error, code, {name: option for name, option in options.items() if option.startswith("--")})


def _complain(problem: object, code: int, options: Mapping[str, str] | None = None) -> int:
    """Print the one line, and the notes below it, and return the code.

    Args:
        problem: an error or a message.
        code: to return.
        options: of the command, by the names that the library has for them.
    """
    message = " ".join(str(problem).split())
    if options:
        message = in_options(message, options)
    if isinstance(problem, OSError) and problem.strerror:
        message = f"{problem.filename}: {problem.strerror}" if problem.filename else problem.strerror
    print(f"gpuback: {shown(message)}", *getattr(problem, "__notes__", ()), sep="\n", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *place: object) -> None:
    """Print a warning as one line, without the place in gpuback's sources."""
    _complain(message, 0)
