"""Masks, sparse matrices, tables, numbers that overflow, NumPy's error state: right numbers or a remedy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse

import gpuback
from gpuback import MLP, SGD, Adam, TrainStep, schedules
from gpuback.errors import DtypeError, OptionError
from gpuback.testing import fingerprint, random_array

pd = pytest.importorskip("pandas")

X, LABELS = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), [0, 1, 0]
MASKED = np.ma.masked_values([[1.0, 2.0], [3.0, -9999.0], [5.0, 6.0]], -9999.0)
ONES = np.ma.array(np.ones((3, 2)), mask=[[0, 0], [0, 0], [1, 0]])


def network(**options: Any) -> MLP:
    return MLP([2, 3, 2], **{"seed": 0, "backend": "numpy"} | options)


# --- masks


WITH_A_MASK: dict[str, Callable[[MLP], object]] = {
    "x": lambda net: net.forward(MASKED),
    "x in float32": lambda net: net.forward(MASKED.astype(np.float32)),
    "a list of masked rows": lambda net: net.forward([MASKED[0], MASKED[1], MASKED[2]]),
    "labels": lambda net: net.loss(X, np.ma.array(LABELS, mask=[0, 0, 1])),
    "targets": lambda net: net.loss(X, np.ma.array(np.eye(3, 2), mask=[[0, 0], [0, 0], [1, 0]])),
    "weights": lambda net: net.loss(X, LABELS, sample_weight=np.ma.array([1.0, 1, 0], mask=[0, 0, 1])),
    "x of fit": lambda net: gpuback.fit(net, MASKED, LABELS, epochs=1),
    "x of a batch": lambda net: gpuback.fit(net, batches=[(MASKED, LABELS)], epochs=1),
    "x of a step": lambda net: TrainStep(net, SGD(0.1))(MASKED, LABELS),
    "x of a check": lambda net: gpuback.check_gradients(net, MASKED, LABELS),
    "dy": lambda net: net.vjp(X)[1](ONES),
    "dx": lambda net: net.jvp(X, dx=ONES),
    "v": lambda net: network(loss="squared_error").taylor(X, np.ma.array(np.eye(2), mask=[[1, 0], [0, 0]])),
    "da": lambda net: gpuback.fused_backward(ONES, X, np.ones((2, 2))),
}


@pytest.mark.parametrize("call", WITH_A_MASK.values(), ids=WITH_A_MASK)
def test_masked_numbers_are_refused(call: Callable[[MLP], object]) -> None:
    """NumPy drops masks silently: the −9999 below one would be trained on."""
    net = network()
    before = net.theta.copy()
    with pytest.raises(DtypeError, match="(?i)mask"):
        call(net)
    np.testing.assert_array_equal(net.theta, before)


def test_masked_arrays_without_a_mask_are_arrays() -> None:
    np.testing.assert_array_equal(network().forward(np.ma.array(X)), network().forward(X))


@pytest.mark.parametrize("kind", [scipy.sparse.csr_matrix, scipy.sparse.coo_array])
def test_sparse_matrices_are_refused_with_the_remedy(kind: Any) -> None:
    for call in (lambda net: net.forward(kind(X)), lambda net: net.loss(X, kind(np.eye(3, 2)))):
        with pytest.raises(DtypeError, match="toarray"):
            call(network())


# --- tables


@pytest.mark.parametrize(
    ("column", "numbers"),
    [
        ([True, False, True], [1, 0, 1]),
        (pd.array([1, 2, 3], dtype="Int64"), [1, 2, 3]),
        (pd.array([1.5, 2, 3], dtype="Float64"), [1.5, 2, 3]),
        (pd.array([True, False, True], dtype="boolean"), [1, 0, 1]),
        (pd.array([1, None, 3], dtype="Int64"), [1, np.nan, 3]),
        (pd.array([True, None, False], dtype="boolean"), [1, np.nan, 0]),
    ],
    ids=["bool", "Int64", "Float64", "boolean", "Int64 with NA", "boolean with NA"],
)
def test_columns_of_a_table_are_numbers(column: Any, numbers: list[float]) -> None:
    table = pd.DataFrame({"first": column, "second": [1.0, 2.0, 3.0]})
    expected = network().forward(np.column_stack([numbers, [1.0, 2.0, 3.0]]))
    np.testing.assert_array_equal(network().forward(table), expected)


@pytest.mark.parametrize("column", [["x", "y", "z"], pd.to_datetime(["2020-01-01"] * 3)], ids=["text", "dates"])
def test_columns_that_are_no_numbers_are_named(column: Any) -> None:
    with pytest.raises(DtypeError, match="colour"):
        network().forward(pd.DataFrame({"colour": column, "second": [1.0, 2.0, 3.0]}))


# --- numbers out of any range


HUGE: dict[str, Callable[[], object]] = {
    "a rate": lambda: SGD(10**400),
    "a rate of more digits than Python prints": lambda: SGD(10**5000),
    "eps": lambda: Adam(eps=10**400),
    "a step": lambda: schedules.constant(0.1)(10**400),
    "a width": lambda: MLP([2, 10**400]),
    "widths whose product no memory holds": lambda: MLP([2**62, 2**62]),
}


@pytest.mark.parametrize("call", HUGE.values(), ids=HUGE)
def test_huge_integers_are_option_errors_of_a_line(call: Callable[[], object]) -> None:
    with pytest.raises(OptionError) as error:
        call()
    assert len(str(error.value)) < 1000


def test_absurd_sizes_say_what_they_would_take() -> None:
    with pytest.raises(OptionError, match="GiB"):
        MLP([2**62, 2**62])


# --- NumPy's error state


def use_everything(net: MLP) -> list[str]:
    """Numbers that underflow and overflow, through every conversion and pass."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((20, 2)), rng.integers(0, 2, 20)
    x[0, 0], x[1, 1] = 1e-60, 1e-310
    weight = np.ones(20)
    weight[0] = 1e-300
    net.forward(1e200 * x)
    net.value_and_grad(x, y, sample_weight=weight, need_input_grad=True)
    net.gradient_norms(1e30 * x, y)
    net.value_and_clipped_grad(1e30 * x, y, 1e-30)
    net.vjp(x)[1](np.full((20, 2), 1e-60))
    gpuback.check_gradients(net, x, y)
    schedule = schedules.warmup(schedules.cosine(1e-300, steps=10), 3)
    gpuback.fit(net, x, y, optimizer=Adam(1e-30), epochs=2, validation=0.2, seed=0, clip_norm=1e-20, schedule=schedule)
    net.theta = np.full(net.n_parameters, 1e-60)
    random_array(rng, (3, 3), scale=1e-60, dtype="float16")
    return [fingerprint(net.theta), fingerprint(pickle.loads(pickle.dumps(net)).forward(x))]


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"reproducible": True}], ids=str)
def test_numpys_error_state_is_the_callers_own(options: dict[str, Any]) -> None:
    """With `np.seterr(all="raise")` nothing raises, and the numbers are the same."""
    expected = use_everything(network(activation="gelu", **options))
    with np.errstate(all="raise"):
        assert use_everything(network(activation="gelu", **options)) == expected
        assert np.geterr() == dict.fromkeys(("divide", "over", "under", "invalid"), "raise")


# --- verdicts


def test_a_sure_and_right_prediction_passes_the_gradient_check() -> None:
    """Logits 14 apart: the loss of 8·10⁻⁷ is the log of a sum whose rounding is 10⁻¹⁶."""
    net = MLP([2, 2], seed=0, dtype="float64", backend="numpy")
    net.theta = [1, 0, 0, 1, 0, 0]
    x = np.random.default_rng(0).uniform(-0.5, 0.5, (20, 2))
    x[:, 0] += 14
    assert gpuback.check_gradients(net, x, [0] * 20).passed


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_a_wrong_gradient_of_sure_predictions_does_not(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = MLP([2, 5, 2], seed=0, dtype=dtype, backend="numpy")
    right = MLP.value_and_grad

    def wrong(self: MLP, *arguments: Any, **options: Any) -> Any:
        loss, gradients = right(self, *arguments, **options)
        gradients.theta[3] *= 1.05
        return loss, gradients

    monkeypatch.setattr(MLP, "value_and_grad", wrong)
    x = np.random.default_rng(0).uniform(-1, 1, (20, 2))
    assert not gpuback.check_gradients(net, x, [0, 1] * 10).passed
