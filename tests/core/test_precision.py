"""gpuback._core.precision: what a dtype stands for, float16's factor, and TF32's rounding bit by bit."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gpuback._core.precision import Precision, round_to_tf32
from gpuback.errors import DtypeError, GpubackError, OptionError

INFINITY, SIGN = 0x7F800000, 0x80000000


@pytest.mark.parametrize(
    ("name", "kind", "total", "sixteen_bit"),
    [
        ("float64", np.float64, np.float64, False),
        ("float32", np.float32, np.float32, False),
        ("bfloat16", ml_dtypes.bfloat16, np.float32, True),
        ("float16", np.float16, np.float32, True),
    ],
)
def test_each_dtype_by_name_and_by_type(name: str, kind: type, total: type, sixteen_bit: bool) -> None:
    for spelling in (name, kind, np.dtype(kind)):
        precision = Precision.of(spelling)
        assert (precision.name, precision.operand, precision.accumulator) == (name, np.dtype(kind), np.dtype(total))
        assert (precision.sixteen_bit, precision.tf32) == (sixteen_bit, False)


@pytest.mark.parametrize("unknown", ["float8", "Float32", "int32", ""])
def test_an_unknown_name_is_named_beside_the_known_ones(unknown: str) -> None:
    with pytest.raises(OptionError) as error:
        Precision.of(unknown)
    assert repr(unknown) in str(error.value) and "bfloat16" in str(error.value)


@pytest.mark.parametrize("kind", [int, np.int64, bool, np.complex64, "U", object()])
def test_what_is_no_float_of_the_table_is_refused(kind: object) -> None:
    with pytest.raises(GpubackError) as error:
        Precision.of(kind)
    assert isinstance(error.value, OptionError if isinstance(kind, str) else DtypeError)


@pytest.mark.parametrize("name", ["float64", "bfloat16", "float16"])
def test_tf32_goes_with_float32_alone(name: str) -> None:
    assert Precision.of("float32", allow_tf32=True).tf32
    with pytest.raises(OptionError, match=f"allow_tf32.*float32.*{name}"):
        Precision.of(name, allow_tf32=True)


def test_float16_carries_the_least_power_of_two_that_covers_the_batch() -> None:
    batch_sizes = [*range(1, 3000), *(2**k + d for k in range(12, 27) for d in (-1, 0, 1))]
    for batch_size in batch_sizes:
        scale = Precision.of("float16").gradient_scale(batch_size)
        assert scale in {2.0**k for k in range(28)}
        assert scale / 2 < batch_size <= scale


@pytest.mark.parametrize("name", ["float64", "float32", "bfloat16"])
def test_the_other_dtypes_carry_no_factor(name: str) -> None:
    assert {Precision.of(name).gradient_scale(batch_size) for batch_size in (1, 2, 3, 1000, 65_537)} == {1.0}


# --- TF32


def nearest_tf32(bits: int) -> int:
    """The pattern of the nearest number with 10 fraction bits, ties away from zero; NaN is some NaN.

    Magnitudes are ordered as their patterns are, and one step of the last place kept is 2¹³ of them, also across a
    change of exponent and among the subnormals.
    """
    sign, magnitude = bits & SIGN, bits & ~SIGN
    if magnitude >= INFINITY:
        return bits
    below, beyond = divmod(magnitude, 1 << 13)
    return sign | (below + (beyond >= 1 << 12)) << 13


def rounded(x: NDArray[np.float32]) -> NDArray[np.uint32]:
    out = np.full_like(x, np.nan)
    assert round_to_tf32(x, out) is out
    return out.view(np.uint32)


def test_tf32_at_every_exponent_and_every_edge_of_the_part_cut_off() -> None:
    """2 signs × 256 exponents × the ends of the part kept × the part cut off around 0, its half and its end."""
    kept = [0, 1, 2, 3, 510, 511, 512, 513, 1020, 1021, 1022, 1023]
    cut = [0, 1, 2, 0x7FF, 0x800, 0xFFE, 0xFFF, 0x1000, 0x1001, 0x17FF, 0x1FFE, 0x1FFF]
    patterns = [
        sign | exponent << 23 | high << 13 | low
        for sign, exponent, high, low in itertools.product((0, SIGN), range(256), kept, cut)
        if exponent < 255 or not high + low
    ]
    values = np.array(patterns, np.uint32).view(np.float32)
    assert rounded(values).tolist() == [nearest_tf32(pattern) for pattern in patterns]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
@example([0x7F7FFFFF, 0xFF7FFFFF, 0x7F7FEFFF, INFINITY, SIGN | INFINITY])  # the largest overflow, one just does not
@example([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000])  # NaN, whose carry would reach the sign
@example([0, SIGN, 1, 0xFFF, 0x1000, 0x007FFFFF, SIGN | 0x1000])  # zeros and subnormals
def test_tf32_of_any_pattern(patterns: list[int]) -> None:
    values = np.array(patterns, np.uint32).view(np.float32)
    result = rounded(values)
    nan = np.isnan(values)
    assert np.isnan(result.view(np.float32))[nan].all()
    assert result[~nan].tolist() == [nearest_tf32(int(bits)) for bits in values.view(np.uint32)[~nan]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1 + 2.0**-11, 1 + 2.0**-10),  # a tie; truncation and ties to even give 1
        (-1 - 2.0**-11, -1 - 2.0**-10),
        (1 + 3 * 2.0**-11, 1 + 2.0**-9),
        (1 + 2.0**-11 - 2.0**-23, 1.0),
        (2 - 2.0**-23, 2.0),
        (2047.0, 2047.0),  # 11 significant bits
        (2049.0, 2050.0),
        (3.4028235e38, np.inf),
        (2.0**-149, 0.0),
        (2.0**-137, 2.0**-136),  # half of the smallest step
    ],
)
def test_tf32_of_numbers_worked_by_hand(value: float, expected: float) -> None:
    assert rounded(np.array([value], np.float32)).view(np.float32)[0] == expected


@pytest.mark.parametrize("layout", ["C", "F", "reversed", "every other", "transposed"])
def test_tf32_of_any_layout_leaves_its_input_alone(layout: str) -> None:
    x = np.random.default_rng(0).standard_normal((12, 30)).astype(np.float32)
    views = {
        "C": x,
        "F": np.asfortranarray(x),
        "reversed": x[::-1, ::-1],
        "every other": x[::2, ::3],
        "transposed": x.T,
    }
    source = views[layout]
    kept = source.copy()
    expected = [[nearest_tf32(int(bits)) for bits in row] for row in kept.view(np.uint32)]
    assert rounded(source).tolist() == expected
    np.testing.assert_array_equal(source, kept)


def test_tf32_with_room_to_work_in() -> None:
    x = np.array([[1.5, np.nan], [2049.0, -np.inf]], np.float32)
    for room in (np.zeros((2, 2), bool), np.ones((2, 2), bool)):
        out = round_to_tf32(x, np.empty_like(x), room)
        np.testing.assert_array_equal(out, [[1.5, np.nan], [2050.0, -np.inf]])


def test_tf32_in_place_and_again_changes_nothing_more() -> None:
    x = np.random.default_rng(0).standard_normal((12, 30)).astype(np.float32)
    once = rounded(x)
    for _ in range(2):
        assert round_to_tf32(x, x) is x
        np.testing.assert_array_equal(x.view(np.uint32), once)
