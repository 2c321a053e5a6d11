"""PyTorch networks to gpuback's, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from gpuback._network.mlp import MLP
from gpuback._torch.constants import NAMED, module_with_constants, name_of_module
from gpuback._torch.module import FusedMLP
from gpuback._torch.passes import name_of
from gpuback.errors import ConversionError, DtypeError, OptionError, ShapeError

MODULES: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "selu": nn.SELU,
    "softsign": nn.Softsign,
    "log_sigmoid": nn.LogSigmoid,
    "hard_tanh": nn.Hardtanh,
    "relu6": nn.ReLU6,
    "hard_sigmoid": nn.Hardsigmoid,
    "gelu": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "gelu_erf": nn.GELU,
    "mish": nn.Mish,
    "hard_swish": nn.Hardswish,
    "softmax": lambda: nn.Softmax(dim=-1),
}

NAMES = {type(make()): name for name, make in MODULES.items()}

OPTIONS: dict[str, tuple[str, Callable[[Any], bool], str]] = {
    "softmax": ("dim", lambda dim: dim in (1, -1), "1 or -1"),
}
"""The attribute that a module's function depends on: its name, the test, and the test in words."""

LOSSES = {"identity": "squared_error", "softmax": "cross_entropy", "sigmoid": "binary_cross_entropy"}
"""For each output function, the loss that a network gets if none is named; squared_error for tanh as well."""


def from_torch(
    module: nn.Module,
    *,
    loss: Any = None,
    dtype: object = None,
    allow_tf32: bool = False,
    reproducible: bool = False,
    backend: str = "auto",
) -> MLP:
    """Convert a chain of `nn.Linear` and activations to an `MLP`, with a copy of its parameters.

    Args:
        module: an `nn.Sequential` (others may be nested in it), an `nn.Linear` or a `FusedMLP`. Between layers:
            Identity, ReLU, ReLU6, LeakyReLU, PReLU (one slope, which does not require grad), ELU, SELU, CELU, Sigmoid,
            LogSigmoid, Tanh, Softplus (threshold 20 or more), Softsign, GELU, SiLU, Mish, Hardsigmoid, Hardswish or
            Hardtanh; at the end nothing, Softmax over the last axis, Sigmoid or Tanh, and where `loss` is a function
            any of these. Flatten and Dropout in evaluation mode do not change rows (B, n_0) and are left out. A Linear
            without bias gets a bias of 0, which training changes.
        loss: by default one that goes with the chain's last function: cross_entropy with Softmax,
            binary_cross_entropy with Sigmoid, else squared_error. A chain that ends with Linear and is trained with
            `nn.CrossEntropyLoss` or `nn.BCEWithLogitsLoss` has loss "cross_entropy" or "binary_cross_entropy":
            `forward` then gives the softmax or sigmoid of its scores. Any other that `gpuback.MLP` takes, too.
        dtype: operands are rounded to it; the parameters' dtype by default (a `FusedMLP`'s own `dtype`).
        allow_tf32, reproducible, backend: as `gpuback.MLP`'s.

    Returns:
        A network whose `forward` equals the module's up to rounding, apart from the output function that a `loss`
        brings. Where the module's parameters have 16 bits, the network's sums and outputs have 32.

    Raises:
        ConversionError: a module without an equivalent, or with hooks that may change its result, such as
            `torch.nn.utils.prune`'s; the message names its place and class.
        ShapeError: widths that do not follow from each other.
        DtypeError: parameters of several dtypes, or of one that gpuback does not compute in.
        OptionError: a loss that does not go with the chain's last function.
    """
    if isinstance(module, FusedMLP):
        if dtype is None:
            dtype, allow_tf32 = module.precision.operand, allow_tf32 or module.precision.tf32
        module = to_torch(module)
    chain = _Chain()
    for place, part in _parts(module):
        chain.add(place, part)
    layers, output = chain.layers, chain.output(module, any_function=callable(loss))
    dtype = layers[0].weight.dtype if dtype is None else dtype
    net = MLP(
        [layers[0].in_features, *(layer.out_features for layer in layers)],
        activation=chain.activations,
        output=None if output == "identity" and loss is not None else output,
        loss=LOSSES.get(output, "squared_error") if loss is None else loss,
        dtype=name_of(dtype) if isinstance(dtype, torch.dtype) else dtype,
        allow_tf32=allow_tf32,
        reproducible=reproducible,
        backend=backend,
        seed=0,
    )
    weights = [layer.weight for layer in layers]
    biases = [
        W.new_zeros(len(W)) if layer.bias is None else layer.bias for W, layer in zip(weights, layers, strict=True)
    ]
    parts = [part.detach().to("cpu", torch.float64) for pair in zip(weights, biases, strict=True) for part in pair]
    net.theta = torch.cat([part.reshape(-1) for part in parts])
    return net


def to_torch(net: MLP | FusedMLP) -> nn.Sequential:
    """Convert to an `nn.Sequential` of `nn.Linear`, activations and the output function, with copied parameters.

    An `MLP`'s modules are on the CPU, in θ's dtype: operands are not rounded to 16 bits there. The result is ŷ. For
    losses that expect raw scores, such as `nn.CrossEntropyLoss`, leave the last module out: `to_torch(net)[:-1]`. A
    `FusedMLP`'s modules have its parameters' dtype and device.

    Raises:
        ConversionError: neither of these, or an activation that PyTorch has no module for: exponential, squareplus,
            sine, silu with a constant, and one of a user's own.
    """
    if not isinstance(net, (MLP, FusedMLP)):
        raise ConversionError(f"expected an MLP or a FusedMLP, got {type(net).__name__}")
    if isinstance(net, FusedMLP):
        layers = [(layer.weight.detach().clone(), layer.bias.detach().clone()) for layer in net.layers]
    else:
        arrays = zip(net.weights, net.biases, strict=True)
        layers = [tuple(torch.tensor(net.ops.to_numpy(part)) for part in pair) for pair in arrays]
    modules: list[nn.Module] = []
    for (W, b), name in zip(layers, [*net.architecture.activations, net.architecture.output], strict=True):
        linear = nn.Linear(W.shape[1], W.shape[0], device="meta")  # without numbers, which would be drawn in vain
        linear.weight, linear.bias = nn.Parameter(W), nn.Parameter(b)
        modules += [linear, _module_named(name)]
    return nn.Sequential(*(modules[:-1] if net.architecture.output == "identity" else modules))


def _module_named(name: str) -> nn.Module:
    """Make the module of an activation or an output function."""
    module = MODULES[name]() if name in MODULES else module_with_constants(name)
    if module is None:
        raise ConversionError(f"activation {name!r}: expected one that PyTorch has a module for")
    return module


def _parts(module: nn.Module, place: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a chain, each with its index, such as 2 or 1.0."""
    if type(module) is not nn.Sequential:
        yield place or "0", module
        return
    for index, part in enumerate(module):  # named_children() gives a module that stands there twice only once
        yield from _parts(part, f"{place}.{index}" if place else str(index))


class _Chain:
    """A network under construction, module by module.

    Attributes:
        layers: the `nn.Linear` so far.
        activations: the names of the functions between them.
    """

    def __init__(self) -> None:
        self.layers: list[nn.Linear] = []
        self.activations: list[str] = []
        self._last = "identity"  # the function after the last layer so far
        self._last_place = self._last_kind = ""

    def add(self, place: str, module: nn.Module) -> None:
        kind = type(module)
        if module._forward_pre_hooks or module._forward_hooks:
            raise _refused(
                place, module, "has hooks, which may change what it computes; remove them first, with prune.remove, "
                "remove_weight_norm or the like"
            )  # fmt: skip
        if kind is nn.Linear:
            self._add_layer(place, module)
        elif kind is nn.Dropout:
            if module.training and module.p > 0:
                raise _refused(place, module, "drops numbers in training mode; module.eval() first")
        elif kind is nn.Flatten:
            if (module.start_dim, module.end_dim) != (1, -1):
                raise _refused(place, module, "flattens other axes than all but the first")
        elif kind is nn.LogSoftmax:
            raise _refused(
                place, module, "gives logarithms, which no output of gpuback's does; leave it out and name "
                "loss='cross_entropy', whose output is softmax"
            )  # fmt: skip
        elif kind in NAMED:
            try:
                name = name_of_module(module)
            except OptionError as error:
                raise _refused(place, module, str(error)) from error
            self._add_function(place, module, name)
        elif kind not in NAMES:
            raise _refused(place, module, f"is none of Linear, Flatten, Dropout, {_known()}")
        elif kind is nn.GELU:
            self._add_function(place, module, "gelu" if module.approximate == "tanh" else "gelu_erf")
        else:
            self._add_function(place, module, NAMES[kind])

    def _add_layer(self, place: str, layer: nn.Linear) -> None:
        if layer.bias is not None and layer.bias.dtype != layer.weight.dtype:
            raise DtypeError(
                f"layer {place} (Linear): expected a bias of {layer.weight.dtype}, as its weight, "
                f"got {layer.bias.dtype}"
            )
        if self.layers:
            before = self.layers[-1]
            if layer.in_features != before.out_features:
                raise ShapeError(
                    f"layer {place} (Linear): expected {before.out_features} inputs, as the layer before it has "
                    f"outputs, got {layer.in_features}"
                )
            if layer.weight.dtype != before.weight.dtype:
                raise DtypeError(
                    f"layer {place} (Linear): expected {before.weight.dtype}, as in the layer before it, "
                    f"got {layer.weight.dtype}"
                )
            if self._last == "softmax":
                raise ConversionError(f"layer {self._last_place} (Softmax): gpuback has softmax as the output only")
            self.activations.append(self._last)
        self.layers.append(layer)
        self._last = "identity"

    def _add_function(self, place: str, module: nn.Module, name: str) -> None:
        if name == "identity":
            return
        attribute, fits, expected = OPTIONS.get(name, ("", bool, ""))
        if attribute and not fits(getattr(module, attribute)):
            raise _refused(place, module, f"has {attribute}={getattr(module, attribute)!r}; expected {expected}")
        if not self.layers:
            raise _refused(place, module, "comes before the first Linear")
        if self._last != "identity":
            raise _refused(place, module, f"follows another function, {self._last}, without a Linear between them")
        self._last, self._last_place, self._last_kind = name, place, type(module).__name__

    def output(self, module: nn.Module, *, any_function: bool) -> str:
        """Return the function at the chain's end.

        Args:
            any_function: also one that goes with no loss of gpuback's.
        """
        if not self.layers:
            raise ConversionError(f"expected a chain of nn.Linear and activations, got none in {type(module).__name__}")
        if not any_function and self._last not in ("identity", "softmax", "sigmoid", "tanh"):
            raise ConversionError(
                f"layer {self._last_place} ({self._last_kind}): expected Linear, Softmax, Sigmoid or Tanh at the end, "
                "or a function as loss"
            )
        return self._last


def _refused(place: str, module: nn.Module, reason: str) -> ConversionError:
    return ConversionError(f"layer {place} ({type(module).__name__}) {reason}")


def _known() -> str:
    return ", ".join(kind.__name__ for kind in dict.fromkeys((*NAMES, *NAMED)))
