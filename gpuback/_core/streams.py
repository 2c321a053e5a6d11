"""Write to the standard streams, whatever they are: absent as under pythonw, closed, odd objects, ASCII only."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from gpuback._text import shown


def is_terminal(stream: Any) -> bool:
    """Tell whether a stream is a terminal; one that is absent, closed or cannot tell is none."""
    try:
        return bool(stream.isatty())
    except Exception:
        return False


class Stream(io.TextIOBase):
    """A text stream over another one, or over none, which accepts every text.

    Args:
        stream: what `sys.stdout` or `sys.stderr` holds. None, closed, or an object that cannot write: text is dropped.
        strict: OSError is raised, since the text is wanted: nobody reads the pipe any more, or the disk is full.
    """

    def __init__(self, stream: Any, *, strict: bool = False) -> None:
        self._stream, self._strict = stream, strict
        given = getattr(stream, "encoding", None)
        self._encoding = given if isinstance(given, str) else "utf-8"

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._encoding

    def isatty(self) -> bool:
        return is_terminal(self._stream)

    def fileno(self) -> int:
        try:
            return int(self._stream.fileno())
        except (AttributeError, TypeError, ValueError) as error:
            raise io.UnsupportedOperation("fileno") from error

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        """Write what the stream's encoding has, and "?" for the rest."""
        with self._tolerance():
            try:
                self._stream.write(text)
            except UnicodeError:
                self._stream.write(text.encode(self._encoding, "replace").decode(self._encoding, "replace"))
        return len(text)

    def flush(self) -> None:
        with self._tolerance():
            self._stream.flush()

    def close(self) -> None:
        """Leave the stream open, which is not this object's."""

    @contextlib.contextmanager
    def _tolerance(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._strict and not isinstance(error, io.UnsupportedOperation):
                raise
        except Exception:  # no such method, closed, an encoding that Python does not know
            pass


@contextlib.contextmanager
def standard_streams() -> Iterator[None]:
    """Let `sys.stdout` and `sys.stderr` accept every text for the length of a command.

    Writing to stdout raises OSError where that would lose results. Nothing that is written to stderr raises.
    """
    _open_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = Stream(sys.stdout, strict=True), Stream(sys.stderr)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            _drop_unwritten(stream)


def say(text: str) -> None:
    """Print a line on stdout where that can be done."""
    print(text, file=Stream(sys.stdout))


def warn(message: str, category: type[Warning] = UserWarning, *, stacklevel: int) -> None:
    """Do as `warnings.warn`, with the message `shown`, where there may be nothing to write it to.

    Raises:
        Warning: the user's filters turn it into an error.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError, TypeError):  # stderr is closed or cannot write
        warnings.warn(shown(message), category, stacklevel=stacklevel + 1)


def _open_descriptors() -> None:
    """Open 0, 1 and 2 where a parent closed them: the next files would get them, and libraries' messages with them."""
    with contextlib.suppress(OSError):
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass
        os.close(descriptor)


def _drop_unwritten(stream: Any) -> None:
    """Flush; where that fails, let what is buffered go nowhere, or it would fail once more when Python exits."""
    try:
        stream.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            descriptor = os.open(os.devnull, os.O_WRONLY)
            os.dup2(descriptor, stream.fileno())
            os.close(descriptor)
    except Exception:  # no such method, or closed
        pass
