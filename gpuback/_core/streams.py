"""Write to the standard streams, whatever they are: absent as under pythonw, closed, odd objects, ASCII only."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from gpuback._text import shown


def is_terminal(stream: Any) -> bool:
    """Tell whether a stream is a terminal; one that is absent, closed or cannot tell is none."""
    try:
        return bool(stream.isatty())
    except Exception:
        return False


class Stream(io.TextIOBase):
    """A text stream over another one, or over none. It accepts every text and never raises.

    Args:
        stream: what `sys.stdout` or `sys.stderr` holds. None, closed, or an object that cannot write: text is dropped.

    Attributes:
        failure: the first error of the system, such as a full disk or a pipe that nobody reads any more. What is
            written after it is dropped.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.failure: OSError | None = None
        try:
            self._encoding = codecs.lookup(stream.encoding).name
        except (AttributeError, TypeError, LookupError):
            self._encoding = "utf-8"

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
        if not isinstance(text, str):  # typer tries to find out whether the stream takes bytes
            raise TypeError(f"expected a str, got {type(text).__name__}")
        self._attempt(lambda: self._write(text))
        return len(text)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeError:
            self._stream.write(text.encode(self._encoding, "replace").decode(self._encoding))

    def flush(self) -> None:
        self._attempt(lambda: self._stream.flush())

    def close(self) -> None:
        """Leave the stream open, which is not this object's."""

    def drop_unwritten(self) -> None:
        """After a failure, let what is buffered go nowhere: it would fail once more when Python exits."""
        self.flush()
        if self.failure is not None:
            with contextlib.suppress(Exception):  # without a descriptor nothing is flushed at the end
                descriptor = os.open(os.devnull, os.O_WRONLY)
                os.dup2(descriptor, self._stream.fileno())
                os.close(descriptor)

    def _attempt(self, act: Callable[[], object]) -> None:
        if self.failure is not None:
            return
        try:
            act()
        except io.UnsupportedOperation:  # an OSError, but not the system's
            pass
        except OSError as error:
            self.failure = error
        except Exception:  # no such method, or closed
            pass


@contextlib.contextmanager
def standard_streams() -> Iterator[Stream]:
    """Make `sys.stdout` and `sys.stderr` a `Stream` for the length of a command; yield that for stdout."""
    _open_descriptors()
    before = sys.stdout, sys.stderr
    streams = Stream(sys.stdout), Stream(sys.stderr)
    sys.stdout, sys.stderr = streams
    try:
        yield streams[0]
    finally:
        sys.stdout, sys.stderr = before
        for stream in streams:
            stream.drop_unwritten()


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
