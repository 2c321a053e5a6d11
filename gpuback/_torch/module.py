"""A multilayer perceptron as a module of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

from gpuback._core.architecture import Architecture
from gpuback._core.parameters import initial_parameters
from gpuback._core.precision import Precision
from gpuback._network.pool import Pool
from gpuback._torch.passes import Fused, accumulator_dtype, name_of, run_forward, take_lease
from gpuback.errors import ConversionError, DeviceError, DtypeError, ShapeError, require_known

OUTPUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda a: a,
    "softmax": lambda a: torch.softmax(a, -1),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


class FusedMLP(nn.Module):
    """h_k = g_k(W_k h_{k−1} + b_k), ŷ = O(a_L), as one operation of automatic differentiation: gpuback's kernels run
    the forward pass, and the backward pass from whatever gradient PyTorch hands back.

    It stands where an `nn.Sequential` of `nn.Linear` and activations stood: the same shapes in and out, and the same
    names in `state_dict`, `0.weight`, `0.bias`, `2.weight`, …, so that each loads the other's. It runs where its
    parameters are, on a CPU through NumPy, on an NVIDIA GPU through CuPy on PyTorch's current stream, and reads and
    writes the tensors' own memory. Hooks on a layer inside are never called.

    Args:
        sizes: (n_0, …, n_L), the width of the input, of each hidden layer, and of the output.
        activation: g by name, one for all hidden layers or one for each, as `gpuback.MLP` names them; `nn.GELU()` is
            gelu_erf.
        output: O: "identity", so that losses such as `nn.CrossEntropyLoss` get the raw scores that they expect,
            "softmax", "sigmoid" or "tanh".
        dtype: the operands of products are rounded to it: float64, float32, bfloat16 or float16 (a name, a NumPy or a
            PyTorch type). Parameters, gradients and sums are float64 for float64, else float32.
        allow_tf32: float32 products may round their operands to TF32 (11 significant bits).
        seed: of the initial weights, as `gpuback.MLP`'s. None draws one from PyTorch's generator, which
            `torch.manual_seed` seeds.
        device: where parameters are made; PyTorch's default device by default.

    `to(dtype)`, `half()` and the like change the parameters' dtype and with it the operands': float64 parameters
    compute in float64, 16-bit ones in their own format, float32 ones in `dtype`, and within `torch.autocast` in its
    dtype. Sums are float32 at least. The result has the parameters' dtype, within `torch.autocast` too, where an
    `nn.Linear`'s has 16 bits.

    Raises:
        ShapeError, OptionError, DtypeError: an argument is out of range or unknown.

    Example:
        >>> net = FusedMLP([2, 3, 2], seed=0)
        >>> net(torch.tensor([[1.0, -1.0]])).shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        sizes: Iterable[int],
        *,
        activation: str | Sequence[str] = "relu",
        output: str = "identity",
        dtype: object = "float32",
        allow_tf32: bool = False,
        seed: int | None = None,
        device: Any = None,
    ) -> None:
        super().__init__()
        require_known("output", output, OUTPUTS)
        self.architecture = Architecture.create(
            sizes,
            activation=activation,
            output=output,
            loss="squared_error",  # which goes with each of these; there is none here
            dtype=name_of(dtype) if isinstance(dtype, torch.dtype) else dtype,
            allow_tf32=allow_tf32,
        )
        total = accumulator_dtype(self.architecture.precision)
        for k, (n_in, n_out) in enumerate(self.architecture.layout.shapes):
            self.add_module(str(2 * k), _Layer(n_in, n_out, total, device))
        self._pool = Pool()
        self.reset_parameters(seed)

    def reset_parameters(self, seed: int | None = None) -> None:
        """Draw initial weights anew: He uniform for rectifiers, Glorot uniform for the rest; biases 0."""
        if seed is None:
            seed = int(torch.randint(2**62, (), device="cpu"))
        names = (*self.architecture.activations, self.architecture.output)
        theta = torch.from_numpy(initial_parameters(self.architecture.layout, names, seed))
        with torch.no_grad():
            for layer, W, b in zip(self.layers, *self.architecture.layout.split(theta), strict=True):
                layer.weight.copy_(W)
                layer.bias.copy_(b)

    @torch.compiler.disable  # it calls compiled kernels, which cannot be traced
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute ŷ (…, n_L) of x (…, n_0), real numbers, cast to the parameters' dtype, which the result has too.

        Raises:
            ShapeError, DtypeError, DeviceError: x does not fit the parameters, or they do not fit each other.
            BackendError: the parameters are on a GPU that gpuback cannot use; the message says why.
            ConversionError: PyTorch is tracing, which cannot see what gpuback computes.
        """
        if torch.jit.is_tracing():
            raise ConversionError(
                "FusedMLP cannot be traced; expected plain modules: gpuback.torch.to_torch(module), or for ONNX "
                "gpuback.onnx.to_onnx(gpuback.torch.from_torch(module), path)"
            )
        parameters = self._checked_parameters()
        own = parameters[0]
        sizes = self.architecture.sizes
        if not isinstance(x, torch.Tensor):
            raise DtypeError(f"x: expected a tensor, got {type(x).__name__}")
        if x.ndim == 0 or x.shape[-1] != sizes[0]:
            raise ShapeError(f"x: expected shape (…, {sizes[0]}) for sizes {sizes}, got {tuple(x.shape)}")
        if x.dtype.is_complex:
            raise DtypeError(f"x: expected real numbers, got {x.dtype}")
        if x.device != own.device:
            raise DeviceError(f"x: expected a tensor on {own.device}, where the parameters are, got one on {x.device}")
        if x.numel() == 0:
            return self._of_no_samples(x.to(own.dtype), parameters).to(own.dtype)
        precision = self._precision_for(_autocast_dtype(own))
        rows = x.reshape(-1, sizes[0]).to(accumulator_dtype(precision)).contiguous()
        need_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows, *parameters))
        need_input_grad = need_gradient and rows.requires_grad
        needs = need_gradient, need_input_grad
        lease = take_lease(self._pool, self.architecture, precision, parameters, len(rows), *needs)
        recorded = need_gradient or any(_is_dual(tensor) for tensor in (rows, *parameters))  # the latter is refused
        a = Fused.apply(lease, rows, *parameters) if recorded else run_forward(lease, rows, parameters)
        return OUTPUTS[self.architecture.output](a).to(own.dtype).reshape(*x.shape[:-1], sizes[-1])

    def _of_no_samples(self, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return no outputs, as `nn.Linear` would, whose gradients are 0."""
        for W, b in zip(parameters[::2], parameters[1::2], strict=True):
            x = nn.functional.linear(x, W, b)
        return x

    @property
    def layers(self) -> list[_Layer]:
        """The layers from the first to the last, each with `weight` W_k (nO, nI) and `bias` b_k (nO,)."""
        return [getattr(self, str(2 * k)) for k in range(len(self.architecture.sizes) - 1)]

    @property
    def precision(self) -> Precision:
        """The precision of products outside of `torch.autocast`: see `dtype`."""
        return self._precision_for(self.layers[0].weight.dtype)

    def _precision_for(self, dtype: torch.dtype) -> Precision:
        chosen = self.architecture.precision
        if dtype == torch.float32 and chosen.accumulator.itemsize == 4:
            return chosen
        name = name_of(dtype)
        return chosen if name == chosen.name else Precision.of(name)

    def _checked_parameters(self) -> list[torch.Tensor]:
        """Return W_1, b_1, …, W_L, b_L; raise unless they have one dtype, one device and the sizes' shapes."""
        layers = self.layers
        parameters = [part for layer in layers for part in (layer.weight, layer.bias)]
        first = parameters[0]
        for index, part in enumerate(parameters):
            name = f"{index // 2 * 2}.{('weight', 'bias')[index % 2]}"
            n_in, n_out = self.architecture.layout.shapes[index // 2]
            expected = (n_out,) if index % 2 else (n_out, n_in)
            if part is None or part.shape != expected:
                came = "None" if part is None else tuple(part.shape)
                raise ShapeError(f"{name}: expected shape {expected} for sizes {self.architecture.sizes}, got {came}")
            if part.dtype != first.dtype:
                raise DtypeError(f"expected parameters of one dtype, got {first.dtype} and {part.dtype}")
            if part.device != first.device:
                raise DeviceError(f"expected parameters on one device, got {first.device} and {part.device}")
        return parameters

    def _apply(self, *arguments: Any, **options: Any) -> FusedMLP:
        """Drop buffers over the old parameters; `to`, `half`, `cuda` and the like all call this."""
        self._pool.clear()
        super()._apply(*arguments, **options)
        return self

    def extra_repr(self) -> str:
        options = self.architecture.as_options()
        return ", ".join(f"{name}={options[name]!r}" for name in ("activation", "output", "dtype", "allow_tf32"))


class _Layer(nn.Module):
    """One layer's parameters, named as `nn.Linear` names them.

    It is not an `nn.Linear`: tools that replace those, e.g. for quantization, would have no effect here.
    """

    def __init__(self, n_in: int, n_out: int, dtype: torch.dtype, device: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(n_out, dtype=dtype, device=device))

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}"


def _is_dual(tensor: torch.Tensor) -> bool:
    """Whether it has a tangent, in automatic differentiation's forward mode."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def _autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype that `torch.autocast`, where it is on, gives a float32 tensor; else the tensor's own."""
    kind = tensor.device.type
    if (
        tensor.dtype != torch.float32
        or not torch.amp.is_autocast_available(kind)
        or not torch.is_autocast_enabled(kind)
    ):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)
