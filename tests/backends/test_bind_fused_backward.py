"""gpuback.bind_fused_backward, and what fused_backward keeps from call to call: the same bits, the same errors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from support.layer_calls import DTYPES, LAYOUTS, Layer, layer, relaid
from test_fused_backward import REFUSED

import gpuback
from gpuback._backends.fused_backward import KEPT_LAYERS, _kept
from gpuback.errors import GpubackError

pytestmark = pytest.mark.on_each_backend
each_activation = pytest.mark.parametrize("activation", ["identity", "relu", "gelu", "exponential"])
each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def bits(results: tuple[Any, ...]) -> list[bytes]:
    return [result.tobytes() for result in results if result is not None]


def options(case: Layer) -> dict[str, Any]:
    return {"activation_prev": case.activation, "a_prev": case.a_prev, "allow_tf32": case.dtype == "tf32"}


def operands(case: Layer) -> tuple[Any, Any, Any]:
    return case.da, case.h_prev, case.W


@each_activation
@each_dtype
def test_a_bound_call_reads_its_arrays_anew_and_returns_its_outputs(dtype: str, activation: str) -> None:
    rng = np.random.default_rng(0)
    first, second = (layer(rng, (37, 5, 11), dtype, activation=activation) for _ in range(2))
    expected = [bits(gpuback.fused_backward(*operands(case), **options(case))) for case in (first, second)]
    backward = gpuback.bind_fused_backward(*operands(first), **options(first))
    outputs = backward()
    assert bits(outputs) == expected[0]
    for name in ("da", "h_prev", "a_prev", "W"):
        getattr(first, name)[...] = getattr(second, name)
    assert all(again is output for again, output in zip(backward(), outputs, strict=True))
    assert bits(outputs) == expected[1]


def test_a_bound_call_adds_to_the_arrays_that_it_was_given() -> None:
    case = layer(np.random.default_rng(1), (20, 3, 4), "float32", kind="integers")
    dW, db = np.zeros((3, 4), np.float32), np.zeros(3, np.float32)
    backward = gpuback.bind_fused_backward(*operands(case), dW=dW, db=db, need_da_prev=False, accumulate=True)
    results = [backward() for _ in range(3)][-1]
    assert results[0] is dW and results[1] is db and results[2] is None
    np.testing.assert_array_equal(dW, 3 * case.da.T @ case.h_prev)
    np.testing.assert_array_equal(db, 3 * case.da.sum(0))


@pytest.mark.parametrize(("arguments", "kind", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_are_the_same_arguments_after_calls_that_were_not(
    arguments: dict[str, Any], kind: type[GpubackError], said: list[str]
) -> None:
    """What was checked once is not checked again; outputs, activations and everything else are."""
    ones = np.ones((4, 4), np.float32)
    for right in ({}, {"activation_prev": "gelu", "a_prev": ones}, {"need_da_prev": False}):
        gpuback.fused_backward(ones, ones, ones, **right)
    arguments = {"da": ones, "h_prev": ones, "W": ones} | arguments
    for call in (gpuback.fused_backward, gpuback.bind_fused_backward):
        with pytest.raises(kind) as error:
            call(**arguments)
        assert all(word in str(error.value) for word in said), str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
@each_dtype
def test_a_second_call_has_the_bits_of_the_first(dtype: str, layout: str) -> None:
    """Between two calls others came, with the same shapes and other layouts, which share nothing with them."""
    case = layer(np.random.default_rng(2), (33, 6, 7), dtype, activation="silu")
    case = Layer(dtype, "silu", "mixed", *(relaid(x, layout) for x in (case.da, case.h_prev, case.a_prev, case.W)))
    first = bits(gpuback.fused_backward(*operands(case), **options(case)))
    for other in LAYOUTS:
        da, h_prev, W = (relaid(x, other) for x in operands(case))
        gpuback.fused_backward(da, h_prev, W, activation_prev="tanh", allow_tf32=dtype == "tf32")
    assert bits(gpuback.fused_backward(*operands(case), **options(case))) == first


@pytest.mark.numpy_only
def test_calls_on_several_threads_share_no_buffers() -> None:
    rng = np.random.default_rng(3)
    cases = [layer(rng, (64, 8, 8), "float32", activation="gelu") for _ in range(4)]
    call = lambda case: bits(gpuback.fused_backward(*operands(case), **options(case)))  # noqa: E731
    expected = [call(case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, cases * 200)) == expected * 200


@pytest.mark.numpy_only
def test_what_is_kept_is_bounded_and_made_for_small_calls_only() -> None:
    for n in range(1, 3 * KEPT_LAYERS):
        ones = np.ones((n, n), np.float32)
        gpuback.fused_backward(ones, ones, ones)
    assert len(_kept.layers) <= KEPT_LAYERS
    large = np.ones((400, 400), np.float32)
    before = list(_kept.layers)
    gpuback.fused_backward(large, large, large)
    assert list(_kept.layers) == before


@pytest.mark.numpy_only
@pytest.mark.parametrize("shape", [(512, 10, 784), (9, 300, 301), (70_000, 8, 9), (65_536, 4, 2)])
def test_large_products_have_the_bits_of_dot(shape: tuple[int, int, int]) -> None:
    case = layer(np.random.default_rng(4), shape, "float32", activation="identity")
    dW, _, da_prev = gpuback.fused_backward(*operands(case))
    assert da_prev is not None
    np.testing.assert_array_equal(dW, case.da.T.dot(case.h_prev))
    np.testing.assert_array_equal(da_prev, case.da.dot(case.W))
