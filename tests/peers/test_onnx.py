"""Networks as ONNX models: ONNX's checker accepts them and ONNX Runtime computes what gpuback computes."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from support.oracle import steepest

import gpuback
from gpuback import MLP
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.precision import UNIT_ROUNDOFF
from gpuback._core.scratch import Scratch
from gpuback.errors import ConversionError, MissingExtraError, MissingFolderError, OptionError
from gpuback.onnx import DEFAULT_OPSET, OLDEST_OPSET, to_onnx
from gpuback.testing import random_array, tolerance

OUTPUTS = ["identity", "softmax", "sigmoid", "tanh"]
DTYPES = ["float64", "float32", "bfloat16", "float16"]
RUN_BY_RUNTIME = range(OLDEST_OPSET, 24)
R = 12
"""Roundings of an elementary function and what little surrounds it."""


def network(activation: Any = "tanh", output: str = "identity", dtype: str = "float32", **options: Any) -> MLP:
    sizes = options.pop("sizes", [6, 19, 17, 5])
    options = {"loss": "squared_error", "seed": 0, "backend": "numpy"} | options
    net = MLP(sizes, activation=activation, output=output, dtype=dtype, **options)
    for b in net.biases:
        b[...] = 0.3 * np.random.default_rng(1).standard_normal(b.shape)
    return net


def run(net: MLP, x: NDArray[Any], path: Path, **options: Any) -> NDArray[Any]:
    """What ONNX Runtime makes of x in θ's dtype."""
    to_onnx(net, path, **options)
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.astype(net.theta.dtype)})
    assert y.dtype == net.theta.dtype
    return y


def exact_and_bound(net: MLP, x: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[Any]]:
    """ŷ in float64 (long double for float64 networks), and how far the numeric contract lets it be missed: the bounds
    of single operations, carried from layer to layer.

    No g is steeper than 1.13; softmax's outputs change by twice their size times the largest change among the scores.
    """
    name, architecture = net.dtype.name, net.architecture
    wide = np.longdouble if name == "float64" else np.float64
    u = UNIT_ROUNDOFF["float64" if name == "float64" else "float32"]
    store = UNIT_ROUNDOFF[name] if architecture.precision.sixteen_bit else 0.0
    smallest = 2.0**-25 if name == "float16" else 0.0
    h, error = x.astype(net.dtype).astype(wide), np.zeros(x.shape)
    for W, b, g in zip(net.weights, net.biases, [*architecture.activations, architecture.output], strict=True):
        W = W.astype(net.dtype).astype(wide)
        a, size = h @ W.T + b, abs(h) @ abs(W).T + abs(b)
        error = error @ abs(W).T.astype(float) + tolerance(size.astype(float), W.shape[1] + 1, name)
        if g == "softmax":
            powers = np.exp(a - a.max(axis=1, keepdims=True))
            h = powers / powers.sum(axis=1, keepdims=True)
            error = h * (2 * error.max(axis=1, keepdims=True) + R * u)
        else:
            h = np.empty_like(a)
            ACTIVATIONS[g].forward(a, h, Scratch(h))
            hidden = W.shape[0] != net.sizes[-1]
            if hidden and ACTIVATIONS[g].derivative_from == "a":
                error = error + store * abs(a) + smallest
            error = steepest(g, a) * error + R * u * (1 + abs(a)) * np.maximum(steepest(g, a), 1)
            if hidden:
                error = error + store * abs(h) + smallest
    return h, error.astype(float)


# --- the same numbers


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(activation: str, dtype: str, tmp_path: Path) -> None:
    scale = 0.3 if activation in ("exponential", "sine") else 1  # beyond, 16 bits leave little of their h
    net, x = network(activation, dtype=dtype), random_array(np.random.default_rng(2), (33, 6), scale=scale)
    exact, bound = exact_and_bound(net, x)
    y = run(net, x, tmp_path / "model.onnx")
    assert (abs(y - exact) <= bound).all()
    assert (abs(net.forward(x) - exact) <= bound).all()
    assert (bound < 0.15 * abs(exact).max()).all()


FAMILIES = (
    *("leaky_relu(slope=0.2)", "leaky_relu(slope=3)", "elu(alpha=0.5)", "celu(alpha=2)", "softplus(beta=100)"),
    *("silu(beta=1.702)", "hard_tanh(low=-0.5, high=0.7)", "sine(w0=3)"),
)


@pytest.mark.parametrize("activation", FAMILIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_with_constants(activation: str, dtype: str, tmp_path: Path) -> None:
    """Where numbers are rounded to 16 bits, one that lies halfway may go either way."""
    net, x = network(activation, dtype=dtype), random_array(np.random.default_rng(2), (33, 6))
    y, expected = run(net, x, tmp_path / "model.onnx"), net.forward(x)
    limit = {"float64": 1e-13, "float32": 2e-5}.get(dtype) or 4 * UNIT_ROUNDOFF[dtype]
    assert abs(y - expected).max() <= limit * abs(expected).max()


def test_a_users_own_activation_is_refused_by_name(tmp_path: Path) -> None:
    gpuback.register_activation("test_square", forward=np.square, slope=lambda a: 2 * a)
    with pytest.raises(ConversionError, match="activation 'test_square': expected one of gpuback's own"):
        to_onnx(network("test_square"), tmp_path / "model.onnx")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_output(output: str, dtype: str, tmp_path: Path) -> None:
    net, x = network(["silu", "relu"], output, dtype), random_array(np.random.default_rng(2), (33, 6), scale=3)
    exact, bound = exact_and_bound(net, x)
    assert (abs(run(net, x, tmp_path / "model.onnx") - exact) <= bound).all()
    assert (abs(net.forward(x) - exact) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_integers_are_exact(dtype: str, tmp_path: Path) -> None:
    net, rng = network(["relu", "identity"], dtype=dtype, sizes=[5, 4, 3, 6]), np.random.default_rng(0)
    net.theta[...] = rng.integers(-2, 3, net.n_parameters)
    x = rng.integers(-3, 4, (50, 5)).astype(float)
    assert np.array_equal(run(net, x, tmp_path / "model.onnx"), net.forward(x))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_networks_round_where_gpuback_does(dtype: str, tmp_path: Path) -> None:
    """Numbers halfway between two of the format's, whose products are whole: a bit not rounded would show."""
    net = network("identity", dtype=dtype, sizes=[3, 3, 3])
    net.theta[...] = 0
    for W in net.weights:
        np.fill_diagonal(W, 1 + UNIT_ROUNDOFF[dtype] * 1.5)
    x = np.random.default_rng(0).standard_normal((100, 3))
    y = run(net, x, tmp_path / "model.onnx")
    assert y.tobytes() == net.forward(x).tobytes()
    assert not np.array_equal(y, x.astype(np.float32))


def test_what_is_rounded_to_16_bits(tmp_path: Path) -> None:
    to_onnx(network(["relu", "silu"], dtype="float16"), tmp_path / "model.onnx")
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    low = {
        node.output[0] for node in nodes if node.op_type == "Cast" and node.attribute[0].i == onnx.TensorProto.FLOAT16
    }
    assert low == {"x.float16", "h_1.float16", "a_2.float16", "h_2.float16"}


def test_numbers_far_from_zero(tmp_path: Path) -> None:
    for activation in set(ACTIVATIONS) - {"exponential"}:
        for dtype in ("float32", "float64"):
            net = network([activation], "softmax", dtype, sizes=[1, 1, 2])
            net.theta[...] = [1, 0, 1, -1, 0, 0]
            x = np.array([[-1e4], [-88.0], [88.0], [1e4]])
            y = run(net, x, tmp_path / "model.onnx")
            assert np.isfinite(y).all()
            assert abs(y - net.forward(x)).max() <= 1e-5, (activation, dtype)


@pytest.mark.parametrize("opset", [OLDEST_OPSET, 20])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "activation", [*(name for name in ACTIVATIONS if name != "sine"), "silu(beta=3)", "celu(alpha=2)"]
)
def test_the_limits_at_infinity(activation: str, dtype: str, opset: int, tmp_path: Path) -> None:
    """−∞ · 0, ∞ − ∞ and ∞/∞ are NaN, also where only what comes between a and h has overflowed."""
    net = network(activation, dtype=dtype, sizes=[1, 1, 1])
    net.theta[...] = [1, 0, 1, 0]
    a = np.array([[-np.inf], [-1e300], [-1e30], [-1e13], [-1e5], [1e5], [1e13], [1e30], [1e300], [np.inf]])
    with np.errstate(over="ignore"):
        a = a.astype(net.theta.dtype)
    expected = net.forward(a)
    assert not np.isnan(expected).any()
    np.testing.assert_allclose(run(net, a, tmp_path / "model.onnx", opset=opset), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("opset", RUN_BY_RUNTIME)
def test_every_opset(opset: int, tmp_path: Path) -> None:
    for dtype, names in itertools.product(DTYPES, (["gelu", "elu"], ["mish", "hard_swish"], ["gelu_erf", "selu"])):
        net, x = network(names, "softmax", dtype), random_array(np.random.default_rng(2), (33, 6))
        exact, bound = exact_and_bound(net, x)
        assert (abs(run(net, x, tmp_path / "model.onnx", opset=opset) - exact) <= bound).all()
        (imported,) = onnx.load(tmp_path / "model.onnx").opset_import
        assert imported.version == opset


def test_newer_opsets_pass_the_checker(tmp_path: Path) -> None:
    for opset in range(RUN_BY_RUNTIME.stop, onnx.defs.onnx_opset_version() + 1):
        to_onnx(network("gelu"), tmp_path / "model.onnx", opset=opset)
        onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)


def test_a_single_layer_and_batches_of_any_size(tmp_path: Path) -> None:
    net = network([], "softmax", sizes=[6, 5])
    to_onnx(net, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for size in (1, 2, 1000):
        x = np.random.default_rng(size).standard_normal((size, 6), dtype=np.float32)
        exact, bound = exact_and_bound(net, x)
        assert (abs(session.run(["y"], {"x": x})[0] - exact) <= bound).all()


def test_reproducible_and_tf32_networks_are_written_as_float32(tmp_path: Path) -> None:
    x = random_array(np.random.default_rng(2), (33, 6))
    expected = run(network(), x, tmp_path / "model.onnx")
    for options in ({"reproducible": True}, {"allow_tf32": True}):
        assert run(network(**options), x, tmp_path / "model.onnx").tobytes() == expected.tobytes()


# --- the file


def test_what_the_model_says_of_itself(tmp_path: Path) -> None:
    net = network(["gelu", "relu"], "sigmoid")
    to_onnx(net, tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert (model.producer_name, model.producer_version) == ("gpuback", gpuback.__version__)
    (architecture,) = (json.loads(entry.value) for entry in model.metadata_props if entry.key == "gpuback.architecture")
    assert architecture == net.architecture.as_options()
    (x,), (y,) = model.graph.input, model.graph.output
    shapes = [[axis.dim_param or axis.dim_value for axis in end.type.tensor_type.shape.dim] for end in (x, y)]
    assert (x.name, y.name, shapes) == ("x", "y", [["batch", 6], ["batch", 5]])
    assert {"W_1", "b_1", "W_3", "b_3"} <= {constant.name for constant in model.graph.initializer}
    assert [node.op_type for node in model.graph.node] == ["Gemm", "Max", "Gelu", "Gemm", "Relu", "Gemm", "Sigmoid"]
    assert [node.output[0] for node in model.graph.node] == ["a_1", "max_1", "h_1", "a_2", "h_2", "a_3", "y"]
    assert model.opset_import[0].version == DEFAULT_OPSET


def test_16_bits_halve_the_file(tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("float32", "bfloat16", "float16"):
        to_onnx(network(sizes=[100, 200, 100], dtype=dtype, activation="relu"), tmp_path / "model.onnx")
        sizes[dtype] = (tmp_path / "model.onnx").stat().st_size
    assert sizes["bfloat16"] == pytest.approx(sizes["float32"] / 2, rel=0.05)
    assert sizes["float16"] == pytest.approx(sizes["float32"] / 2, rel=0.05)


def test_the_same_network_makes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        to_onnx(network(), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_file_that_is_there_is_replaced_or_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"before")

    def fails(*_: Any, **__: Any) -> None:
        raise onnx.checker.ValidationError("not valid")

    with monkeypatch.context() as patch:
        patch.setattr(onnx.checker, "check_model", fails)
        with pytest.raises(onnx.checker.ValidationError):
            to_onnx(network(), path)
    assert path.read_bytes() == b"before"
    to_onnx(network(), path)
    assert path.read_bytes() != b"before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


# --- refusals


@pytest.mark.parametrize("opset", [12, 0, -1, 10_000, 20.0, "20", None, True])
def test_unknown_opsets(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"opset: expected an integer from 13 to \d+, the newest that onnx .* knows, got"
    ):
        to_onnx(network(), tmp_path / "model.onnx", opset=opset)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFolderError):
        to_onnx(network(), tmp_path / "nowhere" / "model.onnx")


def test_more_parameters_than_a_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpuback.onnx.LARGEST_FILE", 1000)
    with pytest.raises(ConversionError, match="2 GiB"):
        to_onnx(network(), tmp_path / "model.onnx")


def test_importing_it_without_onnx_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.delitem(sys.modules, "gpuback.onnx")
    with pytest.raises(MissingExtraError, match=r"gpuback.onnx needs onnx.*pip install '\.\[onnx\]'"):
        importlib.import_module("gpuback.onnx")


def test_other_kinds_of_network_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"expected an MLP, got list; gpuback.torch.from_torch and"):
        to_onnx([1], tmp_path / "model.onnx")  # type: ignore[arg-type]
    assert not (tmp_path / "model.onnx").exists()
