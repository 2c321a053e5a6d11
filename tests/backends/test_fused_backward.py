"""gpuback.fused_backward against float64 (long double for float64): any shape, dtype, activation, data and layout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.layer_calls import ACTIVATIONS, DTYPES, LAYOUTS, SCALES, Layer, array, assert_right, layer, relaid
from support.oracle import G

import gpuback
from gpuback.errors import DeviceError, DtypeError, GpubackError, OptionError, ShapeError
from gpuback.testing import tolerance

each_dtype = pytest.mark.parametrize("dtype", DTYPES)
pytestmark = [
    pytest.mark.on_each_backend(hopper=True),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # the oracle's 1/(1 + e^1000)
]


@st.composite
def sizes(draw: st.DrawFn) -> int:
    """Mostly small, at times up to 300."""
    return draw(st.one_of(st.integers(1, 9), st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129, 255, 300])))


@each_dtype
@settings(deadline=None, max_examples=120, derandomize=True)
@given(data=st.data(), shape=st.tuples(sizes(), sizes(), sizes()), seed=st.integers(0, 2**32 - 1))
def test_any_call(dtype: str, data: st.DataObject, shape: tuple[int, int, int], seed: int) -> None:
    B, n_out, n_in = shape
    if dtype == "float64" and B * n_out * n_in > 300_000:
        shape = B, n_out, n_in = min(B, 40), min(n_out, 65), min(n_in, 65)  # long double has no BLAS
    rng = np.random.default_rng(seed)
    pick = lambda options: data.draw(st.sampled_from(options))  # noqa: E731
    case = layer(
        rng,
        shape,
        dtype,
        activation=pick(ACTIVATIONS),
        kind=pick(["mixed", "positive", "constant", "integers"]),
        scale=pick(SCALES.get(dtype, [1e-6, 1e-3, 1.0, 1e3, 1e6])),
    )
    layouts = {name: relaid(getattr(case, name), pick(LAYOUTS)) for name in ("da", "h_prev", "a_prev", "W")}
    case = Layer(dtype, case.activation, case.kind, **layouts)
    kept = {name: np.array(x).tobytes() for name, x in layouts.items()}

    total, need_da_prev, accumulate = (
        case.W.astype(np.float64).dtype,
        data.draw(st.booleans()),
        data.draw(st.booleans()),
    )
    total = total if dtype == "float64" else np.dtype(np.float32)
    given_arrays = {
        "dW": array(rng, (n_out, n_in), "mixed", 1.0, "float32").astype(total),
        "db": array(rng, (1, n_out), "mixed", 1.0, "float32").astype(total)[0],
        "da_prev": np.full((B, n_in), np.nan, DTYPES[dtype]),
    }
    wanted = [name for name in given_arrays if data.draw(st.booleans()) or (accumulate and name != "da_prev")]
    outs = {name: given_arrays[name] for name in wanted if name != "da_prev" or need_da_prev}
    before = {f"{name}_before": given_arrays[name].copy() for name in ("dW", "db")} if accumulate else {}

    results = case.backward(need_da_prev=need_da_prev, accumulate=accumulate, **outs)

    assert (results[2] is None) == (not need_da_prev)
    for name, result in zip(("dW", "db", "da_prev"), results, strict=True):
        assert result is None or result.flags.c_contiguous
        assert name not in outs or result is outs[name]
    assert {name: np.array(x).tobytes() for name, x in layouts.items()} == kept
    assert_right(case, *results, **before)


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_in_each_dtype(activation: str, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for shape in [(1, 1, 1), (7, 5, 3), (40, 33, 21)]:
        for kind in ("mixed", "positive"):
            case = layer(rng, shape, dtype, activation=activation, kind=kind)
            assert_right(case, *case.backward())


@each_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slopes_far_out_and_at_the_kinks(activation: str, dtype: str) -> None:
    """a_prev on a grid over ±30 with zeros of both signs; identity weights bring out da_prev = da ⊙ g'."""
    most = 11 if (activation, dtype) == ("exponential", "float16") else 30  # e^12 is too large for float16
    a_prev = np.concatenate([np.linspace(-30, most, 598), [0.0, -0.0]]).reshape(60, 10).astype(DTYPES[dtype])
    h_prev = G[activation](a_prev.astype(np.float64)).astype(a_prev.dtype)
    da, W = np.ones_like(a_prev), np.eye(10, dtype=a_prev.dtype)
    case = Layer(dtype, activation, "mixed", da, h_prev, a_prev, W)
    assert_right(case, *case.backward())
    at_zero = {"leaky_relu": 0.01, "relu": 0, "relu6": 0, "sigmoid": 0.25, "hard_sigmoid": 1 / 6, "mish": 0.6}
    at_zero |= {"selu": 1.7580993408473769}
    at_zero |= dict.fromkeys(("softplus", "squareplus", "log_sigmoid", "gelu", "silu", "gelu_erf", "hard_swish"), 0.5)
    rounding = 2.0 ** {"bfloat16": -8, "float16": -10}.get(dtype, -22)
    expected = np.full(2, at_zero.get(activation, 1))
    np.testing.assert_allclose(case.backward()[2][-1, -2:].astype(float), expected, rtol=rounding)


# --- long sums


# Sums of 65,537 terms in the shapes that BLAS libraries treat each in its own way
LONG_AND_NARROW = [pytest.param((65_537, *widths), marks=pytest.mark.numpy_only) for widths in [(1, 1), (4, 1), (1, 4)]]


@pytest.mark.thorough(first=4)
@each_dtype
@pytest.mark.parametrize("kind", ["mixed", "positive", "constant"])
@pytest.mark.parametrize("shape", [(20_000, 5, 3), (65_537, 3, 4), *LONG_AND_NARROW])
def test_long_sums_over_the_batch(shape: tuple[int, int, int], kind: str, dtype: str) -> None:
    case = layer(np.random.default_rng(2), shape, dtype, kind=kind)
    assert_right(case, *case.backward())


@pytest.mark.thorough(first=3)
@each_dtype
@pytest.mark.parametrize("kind", ["mixed", "positive", "constant"])
@pytest.mark.parametrize("shape", [(2, 20_000, 3), (1, 20_000, 1), (3, 20_001, 1), (1, 20_001, 2)])
def test_long_sums_over_the_outputs(shape: tuple[int, int, int], kind: str, dtype: str) -> None:
    case = layer(np.random.default_rng(3), shape, dtype, kind=kind)
    assert_right(case, *case.backward())


@pytest.mark.thorough(first=1)
@each_dtype
@pytest.mark.parametrize("layout", ["C", "F", "every other", "broadcast"])
@pytest.mark.parametrize("value", [0.1, 1 / 3])
def test_a_bias_gradient_of_equal_terms(value: float, layout: str, dtype: str) -> None:
    """Equal terms drift the same way at each addition: only short chains stay within 4√K·u."""
    B = 65_537
    da = relaid(np.full((B, 3), value, DTYPES[dtype]), layout)
    _, db, _ = gpuback.fused_backward(da, da[:, :1], np.ones((3, 1), da.dtype), need_da_prev=False)
    exact = B * np.float64(da[0, 0])
    assert np.all(np.abs(db - exact) <= 4 * np.sqrt(B) * (2.0**-53 if dtype == "float64" else 2.0**-24) * exact)


# --- exact sums


SMALL = [(B, n_out, n_in) for B in (1, 2, 15, 64, 257) for n_out in (1, 7, 48) for n_in in (1, 6, 33)]
LARGE = [(65_537, 3, 2), (20_000, 1, 1), (20_000, 2, 1), (20_000, 1, 2), (2, 20_000, 3)]


@each_dtype
@pytest.mark.parametrize("activation", ["identity", "relu"])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("shapes", [SMALL, pytest.param(LARGE, marks=pytest.mark.numpy_only)], ids=["small", "large"])
def test_small_integers_are_exact(shapes: Any, accumulate: bool, activation: str, dtype: str) -> None:
    """Sums below 2²⁴ come out as the integer, or as the integer rounded once where da_prev is stored in 16 bits."""
    rng, total = np.random.default_rng(4), np.float64 if dtype == "float64" else np.float32
    for B, n_out, n_in in shapes:
        da, W, a = (rng.integers(-3, 4, shape) for shape in ((B, n_out), (n_out, n_in), (B, n_in)))
        h = np.maximum(a, 0) if activation == "relu" else a
        operands = [x.astype(DTYPES[dtype]) for x in (da, h, W)]
        dW_before, db_before = rng.integers(-99, 100, (n_out, n_in)), rng.integers(-99, 100, n_out)
        outs = {"dW": dW_before.astype(total), "db": db_before.astype(total)} if accumulate else {}
        dW, db, da_prev = gpuback.fused_backward(
            *operands, activation_prev=activation, allow_tf32=dtype == "tf32", accumulate=accumulate, **outs
        )
        assert np.array_equal(dW, da.T @ h + accumulate * dW_before)
        assert np.array_equal(db, da.sum(axis=0) + accumulate * db_before)
        dh = (da @ W) * ((h > 0) if activation == "relu" else 1)
        assert np.array_equal(da_prev, dh.astype(np.float32).astype(da_prev.dtype))


@each_dtype
def test_each_sample_output_and_input_counts(dtype: str) -> None:
    """A single 1 somewhere in da shows up at its place in each result, and nowhere else."""
    B, n_out, n_in = 5, 4, 3
    h = np.arange(1, B * n_in + 1).reshape(B, n_in).astype(DTYPES[dtype])
    W = np.arange(21, 21 + n_out * n_in).reshape(n_out, n_in).astype(DTYPES[dtype])
    for b in range(B):
        for i in range(n_out):
            da = np.zeros((B, n_out), DTYPES[dtype])
            da[b, i] = 1
            dW, db, da_prev = gpuback.fused_backward(da, h, W, allow_tf32=dtype == "tf32")
            assert np.array_equal(dW, np.outer(np.eye(n_out)[i], h[b]))
            assert np.array_equal(db, np.eye(n_out)[i])
            assert np.array_equal(da_prev.astype(float), np.outer(np.eye(B)[b], W[i].astype(float)))


def test_tf32_rounds_operands_and_nothing_else() -> None:
    """(1 + 2⁻¹¹)² is a tie on both sides: 1 + 2⁻¹⁰ each. db, which multiplies nothing, keeps the number as it is."""
    x = np.array([[1 + 2.0**-11]], np.float32)
    dW, db, da_prev = gpuback.fused_backward(x, x, x, allow_tf32=True)
    assert dW == da_prev == (1 + 2.0**-10) ** 2
    assert db == x
    dW, db, da_prev = gpuback.fused_backward(x, x, x)
    assert dW == da_prev == np.float32(np.float64(x) ** 2)


@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (65, 40, 129)])
def test_float32_is_not_tf32_unless_allowed(shape: tuple[int, int, int]) -> None:
    """Seen against TF32's product: the two differ by far more than float32's rounding."""
    case = layer(np.random.default_rng(5), shape, "float32", scale=1.1)
    exact = case.da.astype(float).T @ case.h_prev
    limit = tolerance(np.abs(case.da.astype(float)).T @ np.abs(case.h_prev), len(case.da), "float32")
    assert np.all(np.abs(case.backward()[0] - exact) <= limit)
    assert np.any(np.abs(case.backward(allow_tf32=True)[0] - exact) > limit)


@each_dtype
def test_what_is_not_finite_flows_through_where_it_is_used(dtype: str) -> None:
    case = layer(np.random.default_rng(6), (6, 4, 3), dtype)
    case.da[2, 1] = np.nan
    dW, db, da_prev = (np.isnan(x.astype(float)) for x in case.backward())
    assert dW.tolist() == [[i == 1] * 3 for i in range(4)]
    assert db.tolist() == [i == 1 for i in range(4)]
    assert da_prev.tolist() == [[b == 2] * 3 for b in range(6)]


def test_one_array_may_be_several_operands() -> None:
    x = np.random.default_rng(7).standard_normal((5, 5))
    dW, db, da_prev = gpuback.fused_backward(x, x, x)
    np.testing.assert_allclose(dW, x.T @ x, atol=1e-14)
    np.testing.assert_allclose(db, x.sum(axis=0), atol=1e-14)
    np.testing.assert_allclose(da_prev, x @ x, atol=1e-14)


@each_dtype
@pytest.mark.parametrize("name", ["dW", "db", "da_prev"])
def test_outputs_of_any_alignment(name: str, dtype: str) -> None:
    """Views into a larger buffer may start anywhere."""
    case = layer(np.random.default_rng(8), (6, 4, 3), dtype)
    fresh = dict(zip(("dW", "db", "da_prev"), case.backward(), strict=True))
    out = relaid(np.zeros_like(fresh[name]), "unaligned")
    case.backward(**{name: out})
    assert np.array_equal(out, fresh[name])


# --- what is refused

ONES = np.ones((4, 4), np.float32)


def read_only(shape: tuple[int, ...]) -> NDArray[np.float32]:
    out = np.zeros(shape, np.float32)
    out.flags.writeable = False
    return out


class ForeignArray:
    """An array of some other backend, on a GPU."""

    shape, dtype, ndim = (4, 4), np.dtype(np.float32), 2

    def __dlpack__(self, **options: object) -> object:
        raise BufferError("it stays where it is")

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)


SHARED = np.zeros(40, np.float32)
REFUSED: dict[str, tuple[dict[str, Any], type[GpubackError], list[str]]] = {
    "a foreign da": ({"da": ForeignArray()}, DeviceError, ["da", "numpy.ndarray", "ForeignArray"]),
    "a foreign W": ({"W": ForeignArray()}, DeviceError, ["W", "numpy.ndarray", "ForeignArray"]),
    "a foreign dW": ({"dW": ForeignArray()}, DeviceError, ["dW", "numpy.ndarray", "ForeignArray"]),
    "a list": ({"h_prev": [[1.0] * 4] * 4}, GpubackError, ["h_prev", "numpy.ndarray", "list"]),
    "two dtypes": ({"h_prev": np.ones((4, 4))}, DtypeError, ["h_prev", "one dtype", "float32, float64 and float32"]),
    "integers": (dict.fromkeys(("da", "h_prev", "W"), np.ones((4, 4), int)), DtypeError, ["float32", "int64"]),
    "swapped bytes": (dict.fromkeys(("da", "h_prev", "W"), ONES.astype(">f4")), DtypeError, ["float32", ">f4"]),
    "one axis": ({"da": ONES[0]}, ShapeError, ["da", "(B, nO)", "(4,)"]),
    "three axes": ({"h_prev": ONES[None]}, ShapeError, ["h_prev", "(B, nI)", "(1, 4, 4)"]),
    "no axes": ({"W": ONES[0, 0, ...]}, ShapeError, ["W", "(nO, nI)", "()"]),
    "no samples": ({"da": ONES[:0], "h_prev": ONES[:0]}, ShapeError, ["da", "(0, 4)"]),
    "no outputs": ({"da": ONES[:, :0], "W": ONES[:0]}, ShapeError, ["da", "(4, 0)"]),
    "another batch": ({"h_prev": np.ones((3, 4), np.float32)}, ShapeError, ["h_prev (3, 4)", "(B, nI)", "da (4, 4)"]),
    "another width": ({"W": np.ones((4, 5), np.float32)}, ShapeError, ["W (4, 5)", "(nO, nI)", "h_prev (4, 4)"]),
    "W transposed": (
        {"da": np.ones((4, 2), np.float32), "W": np.ones((4, 2), np.float32)},
        ShapeError,
        ["W (4, 2)", "(nO, nI)", "da (4, 2)"],
    ),
    "an unknown activation": ({"activation_prev": "rellu"}, OptionError, ["activation", "'rellu'", "'relu'"]),
    "gelu without a": ({"activation_prev": "gelu"}, OptionError, ["a_prev", "gelu", "None"]),
    "silu without a": ({"activation_prev": "silu"}, OptionError, ["a_prev", "silu", "None"]),
    "a of another shape": (
        {"activation_prev": "gelu", "a_prev": ONES[:3]},
        ShapeError,
        ["a_prev", "(4, 4)", "(3, 4)"],
    ),
    "a of another dtype": (
        {"activation_prev": "silu", "a_prev": np.ones((4, 4))},
        DtypeError,
        ["a_prev", "float32", "float64"],
    ),
    "TF32 in float64": (
        {**dict.fromkeys(("da", "h_prev", "W"), np.ones((4, 4))), "allow_tf32": True},
        OptionError,
        ["allow_tf32", "float32", "float64"],
    ),
    "dW of another shape": ({"dW": np.ones((4, 5), np.float32)}, ShapeError, ["dW", "(4, 4)", "(4, 5)"]),
    "dW of another dtype": ({"dW": np.ones((4, 4))}, DtypeError, ["dW", "float32", "float64"]),
    "dW in 16 bits": (
        {**dict.fromkeys(("da", "h_prev", "W"), ONES.astype(np.float16)), "dW": np.ones((4, 4), np.float16)},
        DtypeError,
        ["dW", "float32", "float16"],
    ),
    "da_prev in 32 bits": (
        {**dict.fromkeys(("da", "h_prev", "W"), ONES.astype(np.float16)), "da_prev": np.ones((4, 4), np.float32)},
        DtypeError,
        ["da_prev", "float16", "float32"],
    ),
    "db as a row": ({"db": np.ones((1, 4), np.float32)}, ShapeError, ["db", "(4,)", "(1, 4)"]),
    "Fortran order": ({"dW": np.zeros((4, 4), np.float32, order="F")}, ShapeError, ["dW", "C-contiguous", "(4, 16)"]),
    "a strided db": ({"db": np.zeros(8, np.float32)[::2]}, ShapeError, ["db", "C-contiguous", "(8,)"]),
    "a read-only dW": ({"dW": read_only((4, 4))}, GpubackError, ["dW", "writeable", "read-only"]),
    "a read-only da_prev": ({"da_prev": read_only((4, 4))}, GpubackError, ["da_prev", "writeable", "read-only"]),
    "dW over W": (
        {"W": SHARED[:16].reshape(4, 4), "dW": SHARED[:16].reshape(4, 4)},
        OptionError,
        ["dW", "memory", "W"],
    ),
    "da_prev over da": (
        {"da": SHARED[:16].reshape(4, 4), "da_prev": SHARED[8:24].reshape(4, 4)},
        OptionError,
        ["da_prev", "memory", "da"],
    ),
    "db in dW": ({"dW": SHARED[:16].reshape(4, 4), "db": SHARED[15:19]}, OptionError, ["memory", "dW", "db"]),
    "da_prev over a_prev": (
        {"activation_prev": "gelu", "a_prev": SHARED[:16].reshape(4, 4), "da_prev": SHARED[:16].reshape(4, 4)},
        OptionError,
        ["da_prev", "memory", "a_prev"],
    ),
    "nothing to add to": ({"accumulate": True}, OptionError, ["accumulate", "dW", "db", "None"]),
    "no db to add to": ({"accumulate": True, "dW": np.zeros((4, 4), np.float32)}, OptionError, ["accumulate", "db"]),
    "no dW to add to": ({"accumulate": True, "db": np.zeros(4, np.float32)}, OptionError, ["accumulate", "dW"]),
    "an unwanted da_prev": (
        {"need_da_prev": False, "da_prev": np.zeros((4, 4), np.float32)},
        OptionError,
        ["da_prev", "need_da_prev=False"],
    ),
}


@pytest.mark.parametrize(("arguments", "kind", "said"), REFUSED.values(), ids=REFUSED)
def test_refusals_name_the_argument_what_was_expected_and_what_came(
    arguments: dict[str, Any], kind: type[GpubackError], said: list[str]
) -> None:
    arguments = {"da": ONES, "h_prev": ONES, "W": ONES} | arguments
    with pytest.raises(kind) as error:
        gpuback.fused_backward(**arguments)
    assert all(word in str(error.value) for word in said), str(error.value)


@pytest.mark.parametrize("kind", [ShapeError, DtypeError, OptionError, DeviceError])
def test_refusals_are_also_the_kinds_that_numpy_raises(kind: type[GpubackError]) -> None:
    assert issubclass(kind, TypeError if kind is DtypeError else ValueError)


def test_a_refused_call_writes_nothing() -> None:
    dW, db = np.full((4, 4), 7, np.float32), np.full(4, 7, np.float32)
    with pytest.raises(GpubackError):
        gpuback.fused_backward(ONES, ONES, ONES, dW=dW, db=db, da_prev=np.zeros((4, 5), np.float32))
    assert dW.tolist() == [[7] * 4] * 4 and db.tolist() == [7] * 4


def test_a_prev_that_is_not_needed_is_not_asked_for() -> None:
    """gelu's g' is not computed at the first layer; tanh's follows from h_prev."""
    assert gpuback.fused_backward(ONES, ONES, ONES, activation_prev="gelu", need_da_prev=False)[2] is None
    for a_prev in (None, ONES):
        da_prev = gpuback.fused_backward(ONES, ONES / 2, ONES, activation_prev="tanh", a_prev=a_prev)[2]
        assert da_prev.tolist() == [[3.0] * 4] * 4
