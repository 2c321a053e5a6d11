"""Write networks as ONNX models, which other programs run without gpuback."""

from __future__ import annotations

import json
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpuback
from gpuback._core import persistence
from gpuback._core.activation_families import constants_of
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.activations_from_a import GELU_CUBIC, GELU_SCALE, SATURATED
from gpuback._core.activations_piecewise import LEAKY_SLOPE
from gpuback._core.precision import DTYPES
from gpuback._core.typing import PathLike
from gpuback._network.mlp import MLP
from gpuback.errors import ConversionError, OptionError, missing_extra

try:
    import onnx
    from onnx import TensorProto, helper
except ImportError as error:
    raise missing_extra("onnx", "gpuback.onnx", "onnx") from error

DEFAULT_OPSET = 20
"""The first with Gelu; ONNX Runtime has known it since 1.17, of January 2024."""

OLDEST_OPSET = 13
"""The first whose Cast knows bfloat16 and whose Softmax works on one axis."""

LARGEST_FILE = 2**31 - 2**20
"""Bytes of parameters: protobuf, which ONNX files are made of, ends at 2 GiB."""

TYPES = {
    "float64": TensorProto.DOUBLE,
    "float32": TensorProto.FLOAT,
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
}

IN_EVERY_TYPE = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}
"""Operators that ONNX Runtime has in float64, too."""

IN_FLOAT32: dict[str, tuple[str, dict[str, Any]]] = {
    "leaky_relu": ("LeakyRelu", {"alpha": LEAKY_SLOPE}),
    "elu": ("Elu", {"alpha": 1.0}),
    "softplus": ("Softplus", {}),
}
"""Operators that ONNX Runtime has not, or whose attributes are float32."""


def to_onnx(net: MLP, path: PathLike, *, opset: int = DEFAULT_OPSET) -> None:
    """Write x ↦ ŷ as an ONNX model: input `x` (batch, n_0), output `y` (batch, n_L), any batch size, in θ's dtype.

    What a layer reads and computes has the name that it has in gpuback's equations: `W_1`, `b_1`, `a_1`, `h_1`, … A
    network of 16 bits keeps its numbers: weights are stored in its format, in half the space, `x` and every h_k are
    rounded to it where gpuback rounds them, by two Casts, and products are of float32, which every runtime has. What
    may use TF32 is written as float32. The model's metadata hold the architecture as JSON. The file is written beside
    `path` and then renamed into place.

    Args:
        net: the network; the loss is not part of the model, the output function is.
        path: the file to make or replace.
        opset: the version of ONNX's operators, from 13 to the newest that the installed onnx knows. gelu is one
            operator from 20 on, several before and in float64.

    Raises:
        OptionError: an opset that onnx does not know, or older than 13.
        ConversionError: no MLP, an activation of a user's own, or more parameters than an ONNX file can hold.
        MissingFolderError: there is no such folder.

    Example:
        >>> to_onnx(MLP([2, 3, 2], seed=0), "quadrants.onnx")
    """
    if not isinstance(net, MLP):
        raise ConversionError(
            f"expected an MLP, got {type(net).__name__}; gpuback.torch.from_torch and gpuback.sklearn.from_sklearn "
            "make one of PyTorch's modules and of estimators"
        )
    newest = onnx.defs.onnx_opset_version()
    if isinstance(opset, bool) or not isinstance(opset, (int, np.integer)) or not OLDEST_OPSET <= opset <= newest:
        raise OptionError(
            f"opset: expected an integer from {OLDEST_OPSET} to {newest}, the newest that onnx {onnx.__version__} "
            f"knows, got {opset!r}"
        )
    size = sum(W.size * net.dtype.itemsize + b.nbytes for W, b in zip(net.weights, net.biases, strict=True))
    if size > LARGEST_FILE:
        raise ConversionError(
            f"expected parameters of 2 GiB at most, which is what an ONNX file holds, got {size:,} bytes"
        )
    model = _model(net, operator.index(opset))
    onnx.checker.check_model(model, full_check=True)
    with persistence.replacing(path) as file:
        file.write(model.SerializeToString(deterministic=True))


def _model(net: MLP, opset: int) -> Any:
    architecture, depth = net.architecture, len(net.sizes) - 1
    graph = _Graph(architecture.precision.name, architecture.precision.accumulator, opset)
    h = graph.rounded("x")
    for k, (W, b, name) in enumerate(zip(net.weights, net.biases, [*architecture.activations, ""], strict=True), 1):
        operands = h, graph.weights(net.ops.to_numpy(W), f"W_{k}"), graph.constant(net.ops.to_numpy(b), f"b_{k}")
        a = graph.node("Gemm", *operands, name=f"a_{k}", transB=1)
        if k == depth:
            break
        if activation_named(name).derivative_from == "a":
            a = graph.rounded(a)
        h = graph.rounded(graph.activation(name, a, f"h_{k}"))
    graph.output(architecture.output, a)

    value, opsets = TYPES[architecture.precision.accumulator.name], [helper.make_opsetid("", opset)]
    ends = [
        helper.make_tensor_value_info(*end)
        for end in (("x", value, ["batch", net.sizes[0]]), ("y", value, ["batch", net.sizes[-1]]))
    ]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "mlp", ends[:1], ends[1:], graph.constants),
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
        producer_name="gpuback",
        producer_version=gpuback.__version__,
    )
    helper.set_model_props(model, {"gpuback.architecture": json.dumps(architecture.as_options())})
    return model


class _Graph:
    """Operators and constants, as they come in.

    Args:
        operand: the name of the dtype that products' operands are rounded to.
        total: the dtype of everything that is computed.
    """

    def __init__(self, operand: str, total: np.dtype[Any], opset: int) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._operand, self._total, self._opset = operand, total, opset
        self._sixteen_bit = operand in ("bfloat16", "float16")

    def node(self, kind: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add an operator; return the name of its result."""
        name = name or f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, value: NDArray[Any], name: str) -> str:
        raw = value.astype(value.dtype.newbyteorder("<"), copy=False).tobytes()
        self.constants.append(helper.make_tensor(name, TYPES[value.dtype.name], value.shape, raw, raw=True))
        return name

    def number(self, value: float) -> str:
        return self.constant(np.array(value, self._total), f"number_{len(self.constants)}")

    def weights(self, W: NDArray[Any], name: str) -> str:
        """Store W in the operands' format; return the name under which products read it."""
        if not self._sixteen_bit:
            return self.constant(W, name)
        with np.errstate(over="ignore"):
            stored = self.constant(W.astype(DTYPES[self._operand]), name)
        return self.node("Cast", stored, name=f"{name}.float32", to=TensorProto.FLOAT)

    def rounded(self, value: str) -> str:
        """Round a value to the operands' format; return the name of the result, which has θ's dtype."""
        if not self._sixteen_bit:
            return value
        low = self.node("Cast", value, name=f"{value}.{self._operand}", to=TYPES[self._operand])
        return self.node("Cast", low, name=f"{value}.rounded", to=TensorProto.FLOAT)

    def activation(self, name: str, a: str, h: str) -> str:
        """h = g(a), as `gpuback._core.activations` has it."""
        found = constants_of(name)
        if found is not None:
            return self._with_constants(*found, a, h)
        if name not in ACTIVATIONS:
            raise ConversionError(f"activation {name!r}: expected one of gpuback's own, of which ONNX has operators")
        if name == "identity":
            return a
        if name in IN_EVERY_TYPE:
            return self.node(IN_EVERY_TYPE[name], a, name=h)
        if name in ("silu", "gelu") and self._sixteen_bit:  # rounded, a may be −∞, which times 0 is NaN
            a = self.node("Max", a, self.number(-SATURATED))
        if name == "silu":
            return self.node("Mul", a, self.node("Sigmoid", a), name=h)
        double = self._total.itemsize == 8
        if name == "gelu":
            if self._opset >= 20 and not double:
                return self.node("Gelu", a, name=h, approximate="tanh")
            cubic = self.node("Mul", self.node("Mul", a, a), self.number(GELU_CUBIC))
            argument = self.node("Mul", self.node("Mul", a, self.number(GELU_SCALE)), self._plus_1(cubic))
            return self.node("Mul", a, self.node("Sigmoid", argument), name=h)
        if not double:
            kind, attributes = IN_FLOAT32[name]
            return self.node(kind, a, name=h, **attributes)
        if name == "leaky_relu":
            return self.node("Max", a, self.node("Mul", a, self.number(LEAKY_SLOPE)), name=h)
        positive = self.node("Max", a, self.number(0.0))
        if name == "elu":
            below = self.node("Exp", self.node("Min", a, self.number(0.0)))
            return self.node("Add", positive, self.node("Sub", below, self.number(1.0)), name=h)
        assert name == "softplus"
        tail = self.node("Exp", self.node("Neg", self.node("Abs", a)))
        return self.node("Add", positive, self.node("Log", self._plus_1(tail)), name=h)

    def _with_constants(self, family: str, constants: dict[str, float], a: str, h: str) -> str:
        """h = g(a) of `gpuback._core.activation_families`."""
        values = list(constants.values())
        first, value = self.number(values[0]), values[0]
        double = self._total.itemsize == 8
        if family == "hard_tanh":
            return self.node("Clip", a, first, self.number(values[1]), name=h)
        if family == "sine":
            return self.node("Sin", self.node("Mul", a, first), name=h)
        if family == "leaky_relu":
            if not double:
                return self.node("LeakyRelu", a, name=h, alpha=value)
            return self.node("Max" if value <= 1 else "Min", a, self.node("Mul", a, first), name=h)
        if family == "softplus":
            return self.node(
                "Div", self.activation("softplus", self.node("Mul", a, first), f"{h}.scaled"), first, name=h
            )
        if family == "silu":
            if self._sixteen_bit:  # rounded, a may be −∞, which times 0 is NaN
                a = self.node("Max", a, self.number(-SATURATED / value))
            return self.node("Mul", a, self.node("Sigmoid", self.node("Mul", a, first)), name=h)
        if family == "elu" and not double:
            return self.node("Elu", a, name=h, alpha=value)
        assert family in ("elu", "celu")
        below = self.node("Min", a, self.number(0.0))
        if family == "celu":
            below = self.node("Div", below, first)
        below = self.node("Mul", first, self.node("Sub", self.node("Exp", below), self.number(1.0)))
        return self.node("Add", self.node("Max", a, self.number(0.0)), below, name=h)

    def _plus_1(self, value: str) -> str:
        return self.node("Add", value, self.number(1.0))

    def output(self, name: str, a: str) -> None:
        """y = O(a)."""
        if name == "softmax":
            self.node("Softmax", a, name="y", axis=1)
        elif name == "identity":
            self.node("Identity", a, name="y")
        else:
            self.node(IN_EVERY_TYPE[name], a, name="y")
