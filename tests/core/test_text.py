"""Text from outside, as messages, terminals and logs show it; errors that go through copy, pickle and processes."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuback._text import MOST_IN_MESSAGE, MOST_IN_NAME, did_you_mean, escaped, listed, quoted, shown
from gpuback.errors import DataError, DivergedError, GpubackError, OptionError, OutputFileError, unknown_name

# --- text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Länge μ → 日本", "Länge μ → 日本"),
        ("C:\\new", "C:\\new"),
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("one\nERROR two\r\t\0\x7f", "one\\nERROR two\\r\\t\\x00\\x7f"),
        ("\x9b31m", "\\x9b31m"),  # CSI in one byte
        ("txt.\u202egpj", "txt.\\u202egpj"),  # right to left
        ("\udcff", "\\udcff"),  # an undecodable byte of a file's name
        ("\u2028\u00a0\u200b", "\\u2028\\xa0\\u200b"),
    ],
)
def test_what_does_not_show_is_escaped(text: str, expected: str) -> None:
    assert escaped(text) == shown(text) == expected


@given(st.text(), st.sampled_from((100, 200, 2000)), st.integers(1, 500))
def test_any_text_is_shown_in_printable_characters_of_a_bounded_length(text: str, most: int, times: int) -> None:
    found = shown(text * times, most)
    assert found.isprintable()
    assert len(found) <= most
    assert shown(found, most) == found


def test_a_long_text_keeps_its_start_and_its_end() -> None:
    found = shown("start" + "x" * 9_000_000 + "end")
    assert len(found) == MOST_IN_MESSAGE
    assert found.startswith("startxxx")
    assert found.endswith("xxxend")
    assert " … (9,000,008 characters) … " in found


def test_a_long_list_says_how_much_more_there_is() -> None:
    assert listed(["a", "b\n"]) == "a, b\\n"
    assert listed(range(10**6), 3) == "0, 1, 2, … and 999,997 more"
    assert len(listed(["x" * 10**5] * 10**5, 3)) < 3 * MOST_IN_NAME + 100


@pytest.mark.parametrize(
    "value",
    ["x" * 10**6, ["\x1b" * 10**5] * 10**5, {i: [i] * 99 for i in range(9999)}, 10**9999, b"\xff" * 10**6],
    ids=lambda value: type(value).__name__,
)
def test_a_value_is_quoted_in_bounded_length(value: object) -> None:
    assert len(quoted(value)) <= 500
    assert quoted(value).isprintable()


def test_a_value_that_cannot_be_shown() -> None:
    class Mute:
        def __repr__(self) -> str:
            raise OSError

    assert quoted(Mute()).startswith("<Mute")


def test_nearest_names_are_looked_for_where_that_takes_no_time() -> None:
    assert did_you_mean("adm", ["sgd", "adam"]) == " Did you mean 'adam'?"
    assert did_you_mean("adm", ["adam"] * 10**6) == did_you_mean("adm" * 10**6, ["adam"]) == ""
    assert did_you_mean("adm", ["adm" * 10**6, "zzz"]) == ""


def test_messages_are_one_bounded_line_without_control_characters() -> None:
    error = DataError(f"file\x1b[2J\n{'x' * 10**7}: expected y")
    assert str(error).startswith("file\\x1b[2J\\nxxx")
    assert str(error).endswith(": expected y")
    assert len(str(error)) <= MOST_IN_MESSAGE
    assert len(str(unknown_name("loss\n", "\x1b" * 10**6, [f"n{i}" for i in range(10**4)]))) < MOST_IN_MESSAGE


# --- errors


def kinds(kind: type[GpubackError]) -> list[type[GpubackError]]:
    """A class of errors and all below it."""
    return [kind, *(lower for below in kind.__subclasses__() for lower in kinds(below))]


def sample(kind: type[GpubackError]) -> GpubackError:
    error = kind("μ\x1b", step=3, epoch=1) if issubclass(kind, DivergedError) else kind("μ\x1b")
    error.add_note("a note")
    error.more = [1, 2]  # type: ignore[attr-defined]
    return error


def same(one: BaseException, other: BaseException) -> bool:
    attributes = ("errno", "filename", "strerror", "step", "epoch", "more", "__notes__")
    return (
        type(one) is type(other)
        and str(one) == str(other)
        and one.args == other.args
        and all(getattr(one, name, None) == getattr(other, name, None) for name in attributes)
    )


ERRORS = [
    *map(sample, dict.fromkeys(kinds(GpubackError))),
    OutputFileError(28, "No space left", "a file"),
    OptionError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_copy_and_pickle(error: GpubackError) -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert same(pickle.loads(pickle.dumps(error, protocol)), error)
    assert same(copy.copy(error), error)
    assert same(copy.deepcopy(error), error)


def fail(number: int) -> None:
    raise ERRORS[number]


@pytest.mark.thorough
def test_errors_reach_the_caller_of_a_process_pool() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(fail, number) for number in range(len(ERRORS))]
        for error, future in zip(ERRORS, futures, strict=True):
            found = future.exception(60)
            assert found is not None
            assert same(found, error)
