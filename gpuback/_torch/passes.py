"""The layers of a network as one operation of PyTorch's automatic differentiation.

Tensors are not copied: NumPy or CuPy arrays over their memory go to gpuback's operations, and results are written into
tensors that PyTorch allocated, on PyTorch's current stream. What the forward pass leaves for the backward pass stays in
buffers that belong to that one call until its graph is freed, so calls may be nested in any order.
"""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from gpuback._typing import Array
from gpuback.architecture import Architecture
from gpuback.backprop import Layers
from gpuback.errors import DeviceError
from gpuback.ops import Ops, ops_for
from gpuback.ops.team import Team, blas_threads
from gpuback.precision import Precision

KEPT_PASSES = 4
"""How many calls' buffers a module keeps for the next ones."""


class Passes(Layers):
    """A module's layers for one number of rows: bound to its parameters' own memory, or to rounded copies of them."""

    def __init__(
        self,
        architecture: Architecture,
        parameters: Sequence[torch.Tensor],
        ops: Ops,
        rows: int,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> None:
        """Args: parameters: W_1, b_1, …, W_L, b_L; the other arguments as those of `Layers`."""
        precision, layout = architecture.precision, architecture.layout
        self._copies: list[torch.Tensor] = []
        self._round_weights: Callable[[], object] = _nothing
        if reads_in_place(precision, parameters):
            arrays = [array_over(parameter, ops) for parameter in parameters]
            weights, biases = arrays[::2], arrays[1::2]
        else:
            with torch.inference_mode(False):  # or no later call outside of that mode could write to it
                theta = torch.empty(layout.n_parameters, dtype=dtype_of_sums(precision), device=parameters[0].device)
            self._copies = [part for pair in zip(*layout.split(theta), strict=True) for part in pair]
            flat = array_over(theta, ops)
            weights, self._round_weights = ops.bind_weights(flat, layout, precision)
            biases = list(layout.split(flat)[1])
        super().__init__(architecture, weights, biases, ops, rows, 1.0, need_gradient, need_input_grad)
        self._float16 = precision.operand == np.float16
        self._ops, self._architecture, self._team = ops, architecture, _team(architecture, ops, rows)
        self._write_output = ops.bind_output("identity", self.output, self.workspace)
        self._load_delta = ops.bind_load(architecture.sizes[-1], precision, self.workspace)

    def run_forward(self, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """a_L (B, n_L), fresh."""
        for copy, parameter in zip(self._copies, parameters if self._copies else (), strict=True):
            copy.copy_(parameter)
        self._round_weights()
        h_0 = array_over(x, self._ops)
        self._team.run(lambda *_: self.forward(h_0), 1)
        out = x.new_empty(len(x), self._architecture.sizes[-1])
        self._write_output(array_over(out, self._ops))
        return out

    def run_backward(self, da: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """∂loss/∂x, if it was bound, and ∂loss/∂W_1, ∂loss/∂b_1, …, from ∂loss/∂a_L; all of them fresh."""
        layout, ops = self._architecture.layout, self._ops
        if self._float16:
            da, unscale = _scaled(da)
        flat = da.new_empty(layout.n_parameters)
        _bits(self.output_delta)[...] = _bits(self._load_delta(array_over(da.contiguous(), ops)))
        sums = layout.split(array_over(flat, ops))
        self._team.run(lambda *_: self.backward(*sums, False), 1)
        dx = None
        if self.input_gradient is not None:
            dx = da.new_empty(len(da), self._architecture.sizes[0])
            array_over(dx, ops)[...] = self.input_gradient
        if self._float16:
            flat *= unscale
            dx = None if dx is None else dx.mul_(unscale)
        return dx, [part for pair in zip(*layout.split(flat), strict=True) for part in pair]

    def forget(self) -> None:
        """Lets go of the batch."""
        self._inputs = []


def _bits(array: Array) -> Array:
    """An array's numbers as integers, for a copy of them as they are, whatever a backend's own arithmetic does."""
    return array.view(np.dtype(f"u{array.itemsize}"))


def _team(architecture: Architecture, ops: Ops, rows: int) -> Team:
    """What keeps BLAS to one thread where a second would cost more than it gains, or where PyTorch keeps to one."""
    _, team = ops.share_out(architecture.sizes, rows, architecture.precision)
    if torch.get_num_threads() == 1:
        return Team(1, blas_alone=blas_threads() > 1)
    return team if team.size == 1 else Team(1, blas_alone=False)  # here the batch is one block


def _scaled(da: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """da times the power of two that brings its largest element to between ½ and 1, and the inverse of that power.

    float16 cannot hold the small gradients of a mean over many samples, nor large sums; the backward pass is linear in
    da, so a factor changes nothing else. Nothing waits for the GPU: the power is put together there, bit by bit.
    """
    exponent = torch.frexp(da.abs().amax()).exponent.to(torch.int32).clamp(-126, 126)
    power, inverse = (((127 + sign * exponent) << 23).view(torch.float32) for sign in (-1, 1))
    return da * power, inverse


class Pool:
    """The passes of one module that no call is using; copies of the module begin with none.

    Threads share it without a lock, which a lease that is dropped amid a collection of garbage could not wait for:
    every step is one that a deque takes whole, and the worst that can happen is that passes are made anew.
    """

    def __init__(self) -> None:
        self._free: deque[tuple[tuple[Any, ...], Passes]] = deque(maxlen=KEPT_PASSES)

    def take(
        self,
        architecture: Architecture,
        precision: Precision,
        parameters: Sequence[torch.Tensor],
        rows: int,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> Lease:
        """Passes for such a call, computed in `precision`, until the lease on them is dropped."""
        device = parameters[0].device
        own = [parameter.data_ptr() for parameter in parameters] if reads_in_place(precision, parameters) else []
        key = (rows, precision, need_gradient, need_input_grad, device, stream_of(device), *own)
        for _ in range(len(self._free)):
            try:
                found, passes = self._free.popleft()
            except IndexError:
                break
            if found == key:
                return Lease(self, key, passes)
            self._free.append((found, passes))
        ops, architecture = ops_on(device.type, device.index), replace(architecture, precision=precision)
        with on_stream_of(device):  # which buffers are zeroed on, and freed on
            passes = Passes(architecture, parameters, ops, rows, need_gradient, need_input_grad)
        return Lease(self, key, passes)

    def give_back(self, key: tuple[Any, ...], passes: Passes) -> None:
        """Keeps them for the next call, in place of the ones that have waited longest if there are many."""
        passes.forget()
        self._free.append((key, passes))

    def clear(self) -> None:
        self._free.clear()

    def __deepcopy__(self, memo: object) -> Pool:
        return Pool()

    def __reduce__(self) -> tuple[type[Pool], tuple[()]]:
        return Pool, ()


class Lease:
    """Passes that belong to one call as long as this object lives: PyTorch drops it with the call's graph."""

    def __init__(self, pool: Pool, key: tuple[Any, ...], passes: Passes) -> None:
        self._pool, self._key, self.passes = pool, key, passes

    def __del__(self) -> None:
        self._pool.give_back(self._key, self.passes)


class Fused(torch.autograd.Function):
    """a_L of x and the parameters; its backward pass gives what ∂loss/∂a_L makes of them."""

    @staticmethod
    def forward(ctx: Any, lease: Lease, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """x (B, n_0) and the result (B, n_L) have the dtype that sums are kept in; parameters may be 16 bits wide."""
        ctx.save_for_backward(x, *parameters)  # so that PyTorch notices if one of them is changed before backward
        ctx.lease = lease
        return run_forward(lease, x, parameters)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, da: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, *parameters = ctx.saved_tensors
        with on_stream_of(da.device):
            dx, gradients = ctx.lease.passes.run_backward(da)
        return None, dx, *(part.to(own.dtype) for part, own in zip(gradients, parameters, strict=True))


def run_forward(lease: Lease, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """a_L (B, n_L), fresh."""
    with on_stream_of(x.device):
        return lease.passes.run_forward(x, parameters)


def dtype_of_sums(precision: Precision) -> torch.dtype:
    """That of x, a_L and the gradients."""
    return torch.float64 if precision.total.itemsize == 8 else torch.float32


def reads_in_place(precision: Precision, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether products can read the parameters where they are."""
    rounded = precision.sixteen_bit or precision.tf32
    return not rounded and all(parameter.is_contiguous() for parameter in parameters)


def array_over(tensor: torch.Tensor, ops: Ops) -> Array:
    """A tensor's own memory as an array of the backend; a copy only of one that is yet to be negated."""
    tensor = tensor.detach().resolve_neg()
    return tensor.numpy() if tensor.device.type == "cpu" else ops.received(tensor, "a tensor")


@functools.cache
def ops_on(kind: str, index: int | None) -> Ops:
    """The backend for a device of PyTorch's.

    Raises:
        DeviceError: a device that is neither a CPU nor an NVIDIA GPU.
        BackendError: CuPy is missing or finds no GPU; the message says which.
    """
    if kind == "cpu":
        return ops_for("numpy")
    if kind != "cuda" or torch.version.hip:
        raise DeviceError(f"expected parameters on a CPU or an NVIDIA GPU, got them on {kind!r}")
    ops_for("cupy")  # raises where there is none
    import cupy

    with cupy.cuda.Device(index):
        return ops_for("cupy")


def stream_of(device: torch.device) -> int:
    """The address of PyTorch's current stream; 0 on a CPU. Buffers are used on one stream only."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


class _Stream:
    """A CUDA stream as CuPy takes it from others."""

    def __init__(self, address: int) -> None:
        self._address = address

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._address


def on_stream_of(device: torch.device) -> AbstractContextManager[object]:
    """What gpuback computes with tensors of that device: after what PyTorch has queued, before what it will."""
    scope = ops_on(device.type, device.index).scope()
    return _queued_on(device, scope) if device.type == "cuda" else scope


@contextlib.contextmanager
def _queued_on(device: torch.device, scope: AbstractContextManager[object]) -> Iterator[None]:
    import cupy

    with scope, cupy.cuda.Device(device.index), cupy.cuda.Stream.from_external(_Stream(stream_of(device))):
        yield


def _nothing() -> None:
    """What there is to do where nothing is rounded."""
