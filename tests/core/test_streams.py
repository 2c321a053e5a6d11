"""Standard streams that are absent, closed, odd, full or ASCII-only: what is written to them raises nothing."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpuback
from gpuback._core.streams import Stream, is_terminal, say, standard_streams, warn


class WriteOnly:
    """Has `write` and nothing else."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> None:
        self.text += text


class AsciiOnly(WriteOnly):
    encoding = "ascii"

    def write(self, text: str) -> None:
        super().write(text.encode("ascii").decode())


class Contrary(WriteOnly):
    """Whose attributes are of no use, and which says that it is a terminal."""

    encoding, errors = 7, None

    def isatty(self) -> int:
        return 1

    def fileno(self) -> str:
        return "none"

    def flush(self) -> None:
        raise RuntimeError


class Unread(WriteOnly):
    """A pipe that nobody reads."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    flush = fileno = write  # type: ignore[assignment]


def closed(stream: io.IOBase) -> io.IOBase:
    stream.close()
    return stream


def detached() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.detach()
    return stream


STREAMS: dict[str, Callable[[], Any]] = {
    "absent": lambda: None,
    "no stream": object,
    "write only": WriteOnly,
    "ASCII only": AsciiOnly,
    "ASCII": lambda: io.TextIOWrapper(io.BytesIO(), encoding="ascii"),
    "contrary": Contrary,
    "unread": Unread,
    "closed": lambda: closed(io.StringIO()),
    "closed bytes": lambda: closed(io.TextIOWrapper(io.BytesIO())),
    "detached": detached,
    "bytes": io.BytesIO,
}


@pytest.fixture(params=STREAMS)
def odd_streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Any]:
    """Puts an odd stream in the place of stdout and stderr. (pytest puts its own there when a test begins.)"""

    def replace() -> Any:
        stream = STREAMS[request.param]()
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        return stream

    return replace


@pytest.mark.parametrize("progress", [None, True])
def test_training_shows_its_progress_on_any_stream(odd_streams: Callable[[], Any], progress: bool | None) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 3)), np.arange(20) % 2
    net = gpuback.MLP([3, 4, 2], seed=0, backend="numpy")
    odd = odd_streams()
    history = gpuback.fit(net, x, y, epochs=2, progress=progress)
    assert len(history.loss) == 2
    if isinstance(odd, WriteOnly) and progress and not isinstance(odd, Unread):
        assert "2/2" in odd.text


def test_warnings_and_lines_are_written_where_they_can_be(
    odd_streams: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = odd_streams()

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: object) -> None:
        if sys.stderr is not None:  # as Python does; pytest has put its own function in its place
            sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", show)
        warn("a ≤ b\x1b[2J", RuntimeWarning, stacklevel=1)
    say("a ≤ b")
    if isinstance(odd, WriteOnly) and not isinstance(odd, (Unread, AsciiOnly)):
        assert "test_streams.py" in odd.text
        assert "RuntimeWarning: a ≤ b\\x1b[2J\n" in odd.text
        assert odd.text.endswith("a ≤ b\n")
    if isinstance(odd, AsciiOnly):
        assert odd.text.endswith("a ? b\n")


def test_a_warning_that_the_user_made_an_error_is_raised(odd_streams: Callable[[], Any]) -> None:
    odd_streams()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match="lost"):
            warn("lost", RuntimeWarning, stacklevel=1)


def test_a_stream_keeps_its_first_failure_and_writes_no_more() -> None:
    class Full(WriteOnly):
        def write(self, text: str) -> None:
            super().write(text)
            raise OSError(28, "No space left on device")

    full = Full()
    stream = Stream(full)
    assert stream.write("a") == stream.write("b") == 1
    stream.flush()
    assert full.text == "a"
    assert stream.failure is not None
    assert stream.failure.errno == 28


def test_a_stream_takes_text_only() -> None:
    with pytest.raises(TypeError):
        Stream(None).write(b"bytes")  # type: ignore[arg-type]


def test_only_a_terminal_is_a_terminal() -> None:
    assert [name for name, make in STREAMS.items() if is_terminal(make())] == ["contrary", "unread"]


def test_standard_streams_come_back(odd_streams: Callable[[], Any]) -> None:
    odd = odd_streams()
    with pytest.raises(KeyError), standard_streams():
        assert sys.stdout is not odd
        print("a ≤ b")
        raise KeyError
    assert sys.stdout is sys.stderr is odd


@pytest.mark.thorough
@pytest.mark.skipif(os.name != "posix", reason="descriptors as POSIX has them")
def test_files_do_not_take_the_descriptors_of_closed_streams(tmp_path: Path) -> None:
    """Else a library's message on descriptor 2 would go into the model."""
    script = (
        "import os\nfrom gpuback._core.streams import standard_streams\n"
        f"with standard_streams(), open({str(tmp_path / 'file')!r}, 'wb') as file:\n"
        "    os.write(2, b'a message')\n    file.write(str(file.fileno() > 2).encode())\n"
    )
    command = f'"{sys.executable}" -c "$SCRIPT" <&- >&- 2>&-'
    root = str(Path(gpuback.__file__).parents[1])
    subprocess.run(command, shell=True, check=True, env={**os.environ, "SCRIPT": script, "PYTHONPATH": root})
    assert (tmp_path / "file").read_bytes() == b"True"
