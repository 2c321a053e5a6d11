"""The layers of a network as one operation of PyTorch's automatic differentiation.

Tensors are not copied: NumPy or CuPy arrays over their memory go to gpuback's operations, and results are written into
tensors that PyTorch allocated, on PyTorch's current stream. Between forward and backward pass, intermediate arrays stay
in buffers that belong to that one call until its graph is freed. So calls may be nested in any order.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.precision import DTYPES, Precision
from gpuback._core.threads import ThreadPool, blas_threads
from gpuback._core.typing import Array
from gpuback._network.held import HeldPasses, Lease
from gpuback._network.layers import BoundNetwork
from gpuback._network.pool import Pool
from gpuback._torch import devices
from gpuback.errors import DtypeError, ShapeError


class ModulePasses:
    """A module's layers for one batch size: bound to its parameters' own memory, or to rounded copies of them."""

    def __init__(
        self,
        key: Hashable,
        architecture: Architecture,
        parameters: Sequence[torch.Tensor],
        ops: Ops,
        batch_size: int,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> None:
        """Args: key: the pool's; parameters: W_1, b_1, …, W_L, b_L; the others as those of `Backprop`."""
        self.key = key
        self._ops, self._architecture, self._need_input_grad = ops, architecture, need_input_grad
        self._copies: list[torch.Tensor] = []
        self._x_at = 0  # the address of the x of the last forward pass
        self._own_weights: list[Array] = []
        self._weights_at = [W.data_ptr() for W in parameters[::2]]
        threads = ThreadPool(1, blas_alone=blas_threads() > 1) if torch.get_num_threads() == 1 else None
        self.held = HeldPasses(
            key, self._bind(parameters), batch_size, "identity", need_gradient=need_gradient, threads=threads
        )
        if need_gradient:
            self.held.bind_backward((True, need_input_grad))

    def _bind(self, parameters: Sequence[torch.Tensor]) -> BoundNetwork:
        """Bind the parameters' own memory where products can read it, else copies of them."""
        architecture, ops = self._architecture, self._ops
        precision, layout = architecture.precision, architecture.layout
        if reads_in_place(precision, parameters):
            arrays = [devices.array_over(parameter, ops) for parameter in parameters]
            self._own_weights = arrays[::2]
            return BoundNetwork(architecture, ops, arrays[::2], arrays[1::2], refresh=_nothing)
        with torch.inference_mode(False):  # or no later call outside of that mode could write to it
            theta = torch.empty(layout.n_parameters, dtype=accumulator_dtype(precision), device=parameters[0].device)
        self._copies = [part for pair in zip(*layout.split(theta), strict=True) for part in pair]
        return BoundNetwork.of(architecture, devices.array_over(theta, ops), ops)

    def forward(self, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a_L (B, n_L), fresh."""
        for copy, parameter in zip(self._copies, parameters if self._copies else (), strict=True):
            copy.copy_(parameter)
        self._x_at = x.data_ptr()
        out = x.new_empty(len(x), self._architecture.sizes[-1])
        self.held.forward(devices.array_over(x, self._ops), devices.array_over(out, self._ops))
        return out

    def backward(
        self, da: torch.Tensor, x: torch.Tensor | None, weights: Sequence[torch.Tensor | None]
    ) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return ∂loss/∂x, if it was bound, and ∂loss/∂W_1, ∂loss/∂b_1, …, all fresh, from da = ∂loss/∂a_L.

        Args:
            da: (B, n_L).
            x, weights: as PyTorch has saved them, None where their numbers do not count. Hooks for saved tensors may
                have brought them elsewhere, while memory that `forward` read in place has other contents by now.
        """
        if x is not None and x.data_ptr() != self._x_at:
            self.held.reload(self._saved(x, (len(da), self._architecture.sizes[0]), da))
        moved = [W is not None and W.data_ptr() != at for W, at in zip(weights, self._weights_at, strict=True)]
        if self._copies or not any(moved):
            return self._backward(da)
        arrays = [
            self._saved(W, tuple(own.shape), da) if W is not None and is_moved else own
            for W, own, is_moved in zip(weights, self._own_weights, moved, strict=True)
        ]
        self.held.use_weights(arrays)
        try:
            return self._backward(da)
        finally:
            self.held.use_weights(None)

    def _saved(self, tensor: torch.Tensor, shape: tuple[int, ...], like: torch.Tensor) -> Array:
        """Return an array over what a hook has unpacked."""
        if tensor.shape != shape:
            raise ShapeError(f"expected a saved tensor of shape {shape} from its hook, got {tuple(tensor.shape)}")
        return devices.array_over(tensor.to(like.device, like.dtype).contiguous(), self._ops)

    def _backward(self, da: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        layout, ops = self._architecture.layout, self._ops
        flat = da.new_empty(layout.n_parameters)
        dx = da.new_empty(len(da), self._architecture.sizes[0]) if self._need_input_grad else None
        theta = devices.array_over(flat, ops)
        gradients = Gradients(theta, *layout.split(theta), None if dx is None else devices.array_over(dx, ops))
        self.held.backward(devices.array_over(da.contiguous(), ops), gradients)
        return dx, [part for pair in zip(*layout.split(flat), strict=True) for part in pair]

    def forget(self) -> None:
        """Drop references to the batch."""
        self.held.forget()


def take_lease(
    pool: Pool,
    architecture: Architecture,
    precision: Precision,
    parameters: Sequence[torch.Tensor],
    rows: int,
    need_gradient: bool,
    need_input_grad: bool,
) -> Lease[ModulePasses]:
    """Lease passes for one call on so many rows, computed in `precision`; dropping the lease releases them."""
    device = parameters[0].device
    own = [parameter.data_ptr() for parameter in parameters] if reads_in_place(precision, parameters) else []
    key = (rows, precision, need_gradient, need_input_grad, device, devices.stream_of(device), *own)
    passes = pool.acquire(key)
    if passes is None:
        ops = devices.ops_on(device.type, device.index)
        with devices.on_stream_of(device):  # on which buffers are zeroed and freed
            made_of = replace(architecture, precision=precision), parameters, ops, rows, need_gradient, need_input_grad
            passes = ModulePasses(key, *made_of)
    return Lease(pool, passes)


class Fused(torch.autograd.Function):
    """a_L as a function of x and the parameters, with a backward pass."""

    @staticmethod
    def forward(ctx: Any, lease: Lease[ModulePasses], x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """Compute a_L (B, n_L) of x (B, n_0), both in the accumulator's dtype; parameters may have 16 bits.

        What the backward pass reads is saved, as an nn.Linear saves it: x if W_1 needs a gradient, and W_k if something
        below layer k does. So PyTorch notices if it is changed before, and hooks for saved tensors get it.
        """
        _, *needed = ctx.needs_input_grad
        reads = [needed[1], *(k % 2 == 0 and any(needed[: k + 1]) for k in range(len(parameters)))]
        tensors = x, *parameters
        ctx.save_for_backward(*itertools.compress(tensors, reads))
        ctx.others = [None if read else tensor for tensor, read in zip(tensors, reads, strict=True)]
        ctx.lease = lease
        return run_forward(lease, x, parameters)

    @staticmethod
    def backward(ctx: Any, da: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)  # once: a hook may unpack them only once
        tensors: list[torch.Tensor] = [next(saved) if other is None else other for other in ctx.others]
        x, *read = [tensor if other is None else None for tensor, other in zip(tensors, ctx.others, strict=True)]
        with torch.no_grad(), devices.on_stream_of(da.device):
            dx, gradients = ctx.lease.run(ctx.lease.passes.backward, da, x, read[::2])
        found = [part.to(own.dtype) for part, own in zip(gradients, tensors[1:], strict=True)]
        if dx is not None:
            found.append(dx)
        if torch.is_grad_enabled():  # for gradients of gradients
            found = list(FirstOrder.apply(len(found), *found, da, *tensors))
        return None, None if dx is None else found.pop(), *found


class FirstOrder(torch.autograd.Function):
    """Gradients, unchanged, whose own backward pass is an error.

    PyTorch's `once_differentiable` would take them for constants where ∂loss/∂a_L is constant.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the first `count` tensors; they depend on the others."""
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise RuntimeError(
            "FusedMLP has no gradients of gradients; gpuback.torch.to_torch(module) is an nn.Sequential, which has them"
        )


def run_forward(lease: Lease[ModulePasses], x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a_L (B, n_L), fresh, computed on PyTorch's current stream."""
    with devices.on_stream_of(x.device):
        return lease.run(lease.passes.forward, x, parameters)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype that gpuback computes in."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DtypeError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    return name


def accumulator_dtype(precision: Precision) -> torch.dtype:
    """Return the dtype of x, a_L and the gradients."""
    return torch.float64 if precision.accumulator.itemsize == 8 else torch.float32


def reads_in_place(precision: Precision, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether products can read the parameters where they are."""
    rounded = precision.sixteen_bit or precision.tf32
    return not rounded and all(parameter.is_contiguous() for parameter in parameters)


def _nothing() -> None:
    """Do nothing: no weights are rounded."""
