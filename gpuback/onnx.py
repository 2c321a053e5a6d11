"""Write networks as ONNX models, which other programs run without gpuback."""

from __future__ import annotations

import json
import math
import operator
from typing import Any

import numpy as np
from numpy.typing import NDArray

import gpuback
from gpuback._core.activation_families import constants_of
from gpuback._core.activation_names import activation_named
from gpuback._core.activations import ACTIVATIONS
from gpuback._core.activations_from_a import GELU_CUBIC, GELU_SCALE, MILLS_FLOAT64, MISH_LIMIT, NORMAL_TAIL, SATURATED
from gpuback._core.activations_from_h import LARGEST, SELU_DEPTH, SELU_SCALE
from gpuback._core.activations_piecewise import LEAKY_SLOPE
from gpuback._core.output_files import replacing
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

IN_EVERY_TYPE = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh", "exponential": "Exp", "sine": "Sin"}
"""Operators that ONNX Runtime has in float64, too."""

IN_FLOAT32: dict[str, tuple[str, int, dict[str, Any]]] = {
    "leaky_relu": ("LeakyRelu", OLDEST_OPSET, {"alpha": LEAKY_SLOPE}),
    "elu": ("Elu", OLDEST_OPSET, {"alpha": 1.0}),
    "softplus": ("Softplus", OLDEST_OPSET, {}),
    "selu": ("Selu", OLDEST_OPSET, {"alpha": SELU_DEPTH / SELU_SCALE, "gamma": SELU_SCALE}),
    "softsign": ("Softsign", OLDEST_OPSET, {}),
    "hard_sigmoid": ("HardSigmoid", OLDEST_OPSET, {"alpha": 1 / 6, "beta": 0.5}),
    "hard_swish": ("HardSwish", 14, {}),
    "mish": ("Mish", 18, {}),
    "gelu": ("Gelu", 20, {"approximate": "tanh"}),
    "gelu_erf": ("Gelu", 20, {}),
}
"""Operators that ONNX Runtime has not in float64, or whose attributes are float32, and the first opset with them."""

CLIPPED = {"hard_tanh": (-1.0, 1.0), "relu6": (0.0, 6.0)}
"""Activations that only limit a."""


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
        opset: the version of ONNX's operators, from 13 to the newest that the installed onnx knows. gelu and gelu_erf
            are one operator from 20 on, mish from 18 on, hard_swish from 14 on; before, and in float64, they are
            several.

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
    with replacing(path) as file:
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
        with np.errstate(all="ignore"):
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
        if name in CLIPPED:
            return self.node("Clip", a, *map(self.number, CLIPPED[name]), name=h)
        if ACTIVATIONS[name].derivative_from == "a":  # h is a times what is 0 there, and −∞ · 0 is NaN
            a = self.node("Max", a, self.number(-SATURATED))
        if name == "softsign":  # ∞/∞ is NaN
            a = self.node("Clip", a, self.number(-LARGEST), self.number(LARGEST))
        if name in IN_FLOAT32 and self._total.itemsize == 4:
            kind, first_opset, attributes = IN_FLOAT32[name]
            if self._opset >= first_opset:
                return self.node(kind, a, name=h, **attributes)
        formula = getattr(self, f"_{name}")
        return str(formula(a, h))

    def _with_constants(self, family: str, constants: dict[str, float], a: str, h: str) -> str:
        """h = g(a) of `gpuback._core.activation_families`."""
        value, *more = constants.values()
        in_float32 = self._total.itemsize == 4
        if family == "hard_tanh":
            return self.node("Clip", a, self.number(value), *map(self.number, more), name=h)
        if family == "sine":
            return self.node("Sin", self._times(a, value), name=h)
        if family == "softplus":
            scaled = self.activation("softplus", self._times(a, value), f"{h}.scaled")
            return self.node("Div", scaled, self.number(value), name=h)
        if family == "silu":
            a = self.node("Max", a, self.number(-SATURATED / value))  # −∞ · 0 is NaN
            return self.node("Mul", a, self.node("Sigmoid", self._times(a, value)), name=h)
        if family in ("leaky_relu", "elu") and in_float32:
            return self.node(IN_FLOAT32[family][0], a, name=h, alpha=value)
        if family == "leaky_relu":
            return self.node("Max" if value <= 1 else "Min", a, self._times(a, value), name=h)
        assert family in ("elu", "celu")
        scaled = self.node("Div", a, self.number(value)) if family == "celu" else a
        return self.node("Add", self._positive(a), self._times(self._expm1_below(scaled), value), name=h)

    def _silu(self, a: str, h: str) -> str:
        return self.node("Mul", a, self.node("Sigmoid", a), name=h)

    def _gelu(self, a: str, h: str) -> str:
        cubic = self._times(self.node("Mul", a, a), GELU_CUBIC)
        argument = self.node("Mul", self._times(a, GELU_SCALE), self._plus(cubic, 1.0))
        return self.node("Mul", a, self.node("Sigmoid", argument), name=h)

    def _gelu_erf(self, a: str, h: str) -> str:
        """Add a Φ(a); in float64, where ONNX Runtime has no Erf, as `gpuback._core.activations_from_a` computes it."""
        if self._total.itemsize == 4:
            erf = self.node("Erf", self._times(a, math.sqrt(0.5)))
            return self.node("Mul", self._times(a, 0.5), self._plus(erf, 1.0), name=h)
        y = self.node("Min", self.node("Abs", a), self.number(NORMAL_TAIL))
        p, (*coefficients, last) = MILLS_FLOAT64
        t = self.node("Reciprocal", self._plus(self._times(y, p), 1.0))
        s = self._plus(self._times(t, 2.0), -1.0)
        mills = self.number(last)
        for coefficient in reversed(coefficients):
            mills = self._plus(self.node("Mul", mills, s), coefficient)
        density = self._times(self.node("Exp", self._times(self.node("Mul", y, y), -0.5)), 1 / math.sqrt(2 * math.pi))
        tail = self.node("Mul", self.node("Mul", y, density), self.node("Mul", t, mills))
        return self.node("Sub", self._positive(a), tail, name=h)

    def _mish(self, a: str, h: str) -> str:
        e = self.node("Exp", self.node("Min", a, self.number(MISH_LIMIT)))
        n = self.node("Mul", e, self._plus(e, 2.0))
        return self.node("Mul", a, self.node("Div", n, self._plus(n, 2.0)), name=h)

    def _hard_swish(self, a: str, h: str) -> str:
        return self.node("Mul", a, self._hard_sigmoid(a, f"{h}.gate"), name=h)

    def _hard_sigmoid(self, a: str, h: str) -> str:
        clipped = self.node("Clip", self._plus(a, 3.0), self.number(0.0), self.number(6.0))
        return self.node("Div", clipped, self.number(6.0), name=h)

    def _leaky_relu(self, a: str, h: str) -> str:
        return self.node("Max", a, self._times(a, LEAKY_SLOPE), name=h)

    def _elu(self, a: str, h: str) -> str:
        return self.node("Add", self._positive(a), self._expm1_below(a), name=h)

    def _selu(self, a: str, h: str) -> str:
        above, below = self._times(self._positive(a), SELU_SCALE), self._times(self._expm1_below(a), SELU_DEPTH)
        return self.node("Add", above, below, name=h)

    def _softplus(self, a: str, h: str) -> str:
        return self.node("Add", self._positive(a), self._log_tail(a), name=h)

    def _log_sigmoid(self, a: str, h: str) -> str:
        return self.node("Sub", self.node("Min", a, self.number(0.0)), self._log_tail(a), name=h)

    def _softsign(self, a: str, h: str) -> str:
        return self.node("Div", a, self._plus(self.node("Abs", a), 1.0), name=h)

    def _squareplus(self, a: str, h: str) -> str:
        q = self._times(self.node("Abs", a), 0.5)
        root = self.node("Sqrt", self._plus(self.node("Mul", q, q), 1.0))
        return self.node("Add", self._positive(a), self.node("Reciprocal", self.node("Add", q, root)), name=h)

    def _expm1_below(self, a: str) -> str:
        """e^min(a, 0) − 1."""
        return self._plus(self.node("Exp", self.node("Min", a, self.number(0.0))), -1.0)

    def _log_tail(self, a: str) -> str:
        """log(1 + e^−|a|)."""
        tail = self.node("Exp", self.node("Neg", self.node("Abs", a)))
        return self.node("Log", self._plus(tail, 1.0))

    def _positive(self, a: str) -> str:
        return self.node("Max", a, self.number(0.0))

    def _plus(self, value: str, addend: float) -> str:
        return self.node("Add", value, self.number(addend))

    def _times(self, value: str, factor: float) -> str:
        return self.node("Mul", value, self.number(factor))

    def output(self, name: str, a: str) -> None:
        """y = O(a)."""
        if name == "softmax":
            self.node("Softmax", a, name="y", axis=1)
        elif name == "identity":
            self.node("Identity", a, name="y")
        else:
            self.activation(name, a, "y")
