"""The layers of a network as one operation of PyTorch's automatic differentiation.

Tensors are not copied: NumPy or CuPy arrays over their memory go to gpuback's operations, and results are written into
tensors that PyTorch allocated, on PyTorch's current stream. Between forward and backward pass, intermediate arrays stay
in buffers that belong to that one call until its graph is freed. So calls may be nested in any order.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.precision import DTYPES, Precision
from gpuback._core.threads import ThreadPool, blas_threads
from gpuback._core.typing import Array
from gpuback._network.layers import BoundNetwork, Layers
from gpuback._network.pool import Pool
from gpuback._network.tasks import Tasks
from gpuback._torch import devices
from gpuback.errors import DtypeError


class ModulePasses:
    """A module's layers for one batch size: bound to its parameters' own memory, or to rounded copies of them.

    As in `gpuback._network.backprop`, a batch goes through the network in blocks of rows, which make up tasks for
    threads. But with `need_gradient` every block has buffers of its own, in which it waits for its backward pass.
    """

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
        self._ops, self._architecture = ops, architecture
        self._float16 = architecture.precision.operand == np.float16
        self._need_gradient, self._need_input_grad = need_gradient, need_input_grad
        self._copies: list[torch.Tensor] = []
        self._network = network = self._bind(parameters)
        threads = ThreadPool(1, blas_alone=blas_threads() > 1) if torch.get_num_threads() == 1 else None
        self._tasks = tasks = Tasks(network, batch_size, need_gradient, threads=threads)

        def block(rows: int) -> _Block:
            return _Block(network, rows, need_gradient, need_input_grad)

        if need_gradient:
            ends = itertools.chain.from_iterable(tasks.spans)
            self._blocks: dict[object, _Block] = {start: block(end - start) for start, end in ends}
        else:
            self._blocks = {(height, worker): block(height) for height in tasks.heights for worker in tasks.workers}

    def _bind(self, parameters: Sequence[torch.Tensor]) -> BoundNetwork:
        """Bind the parameters' own memory where products can read it, else copies of them."""
        architecture, ops = self._architecture, self._ops
        precision, layout = architecture.precision, architecture.layout
        if reads_in_place(precision, parameters):
            arrays = [devices.array_over(parameter, ops) for parameter in parameters]
            return BoundNetwork(architecture, ops, arrays[::2], arrays[1::2], refresh=_nothing)
        with torch.inference_mode(False):  # or no later call outside of that mode could write to it
            theta = torch.empty(layout.n_parameters, dtype=accumulator_dtype(precision), device=parameters[0].device)
        self._copies = [part for pair in zip(*layout.split(theta), strict=True) for part in pair]
        return BoundNetwork.of(architecture, devices.array_over(theta, ops), ops)

    def forward(self, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a_L (B, n_L), fresh."""
        for copy, parameter in zip(self._copies, parameters if self._copies else (), strict=True):
            copy.copy_(parameter)
        self._network.refresh()
        out = x.new_empty(len(x), self._architecture.sizes[-1])
        samples, a = devices.array_over(x, self._ops), devices.array_over(out, self._ops)

        def work(task: int, worker: int) -> None:
            for start, end in self._tasks.spans[task]:
                block = self._blocks[start if self._need_gradient else (end - start, worker)]
                block.run_forward(samples[start:end], a[start:end])

        self._tasks.run(work)
        return out

    def backward(self, da: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """Return ∂loss/∂x, if it was bound, and ∂loss/∂W_1, ∂loss/∂b_1, …, all fresh, from da = ∂loss/∂a_L."""
        layout, ops = self._architecture.layout, self._ops
        if self._float16:
            da, unscale = _scaled(da)
        flat = da.new_empty(layout.n_parameters)
        dx = da.new_empty(len(da), self._architecture.sizes[0]) if self._need_input_grad else None
        delta, gradient = devices.array_over(da.contiguous(), ops), devices.array_over(flat, ops)
        inputs = None if dx is None else devices.array_over(dx, ops)
        sums = [layout.split(part) for part in (gradient, *self._tasks.partials)]

        def work(task: int, worker: int) -> None:
            spans = self._tasks.spans[task]
            for start, end in spans:
                block = self._blocks[start]
                block.run_backward(delta[start:end], *sums[task], start > spans[0][0])
                if inputs is not None:
                    inputs[start:end] = block.input_gradient

        self._tasks.run(work)
        for partial in self._tasks.partials:
            gradient += partial
        if self._float16:
            flat *= unscale
            dx = None if dx is None else dx.mul_(unscale)
        return dx, [part for pair in zip(*layout.split(flat), strict=True) for part in pair]

    def forget(self) -> None:
        """Drop references to the batch."""
        for block in self._blocks.values():
            block.h_0 = None


class _Block(Layers):
    """All layers for one block of rows, whose forward pass may be long before its backward pass."""

    def __init__(self, network: BoundNetwork, rows: int, need_gradient: bool, need_input_grad: bool) -> None:
        super().__init__(network, rows, 1.0)
        if need_gradient:
            self.backward = self.bind_backward([True] * len(network.weights), need_input_grad)
        architecture, ops = network.architecture, network.ops
        self.h_0: Array = None
        self._write_output = ops.bind_output("identity", self.output, self.workspace)
        self._load_delta = ops.bind_load(architecture.sizes[-1], architecture.precision, self.workspace)

    def run_forward(self, x: Array, out: Array) -> None:
        """Compute out = a_L; keep h_0, which may be x itself, for the backward pass."""
        self.h_0 = self.forward(x)
        self._write_output(out)

    def run_backward(self, da: Array, dW: Sequence[Array], db: Sequence[Array], accumulate: bool) -> None:
        """Compute dW and db (=, or += with `accumulate`) from da = ∂loss/∂a_L."""
        _bits(self.output_delta)[...] = _bits(self._load_delta(da))
        self.backward(self.h_0, dW, db, accumulate)


def _bits(array: Array) -> Array:
    """View an array's bits as integers, to copy them without a backend's own arithmetic."""
    return array.view(np.dtype(f"u{array.itemsize}"))


def _scaled(da: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale da by the power of two that brings its largest element to between ½ and 1; return the inverse power too.

    float16 cannot hold the small gradients of a mean over many samples, nor large sums. The backward pass is linear in
    da, so a factor changes nothing else. The power is assembled on the GPU, bit by bit: the host does not wait.
    """
    exponent = torch.frexp(da.abs().amax()).exponent.to(torch.int32).clamp(-126, 126)
    power, inverse = (((127 + sign * exponent) << 23).view(torch.float32) for sign in (-1, 1))
    return da * power, inverse


def take_lease(
    pool: Pool,
    architecture: Architecture,
    precision: Precision,
    parameters: Sequence[torch.Tensor],
    rows: int,
    need_gradient: bool,
    need_input_grad: bool,
) -> Lease:
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


class Lease:
    """Passes that belong to one call as long as this object lives: PyTorch drops it with the call's graph.

    Attributes:
        lock: for the backward pass, which several threads may run at once through one graph.
    """

    def __init__(self, pool: Pool, passes: ModulePasses) -> None:
        self._pool, self.passes, self.lock = pool, passes, threading.Lock()

    def __del__(self) -> None:
        self.passes.forget()
        self._pool.release(self.passes)


class Fused(torch.autograd.Function):
    """a_L as a function of x and the parameters, with a backward pass."""

    @staticmethod
    def forward(ctx: Any, lease: Lease, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        """Compute a_L (B, n_L) of x (B, n_0), both in the accumulator's dtype; parameters may have 16 bits."""
        ctx.save_for_backward(x, *parameters)  # so that PyTorch notices if one of them is changed before backward
        ctx.lease = lease
        return run_forward(lease, x, parameters)

    @staticmethod
    def backward(ctx: Any, da: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _, *parameters = ctx.saved_tensors
        with torch.no_grad(), devices.on_stream_of(da.device), ctx.lease.lock:
            dx, gradients = ctx.lease.passes.backward(da)
        found = [part.to(own.dtype) for part, own in zip(gradients, parameters, strict=True)]
        if dx is not None:
            found.append(dx)
        if torch.is_grad_enabled():  # for gradients of gradients
            found = list(FirstOrder.apply(len(found), *found, da, *ctx.saved_tensors))
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


def run_forward(lease: Lease, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a_L (B, n_L), fresh, computed on PyTorch's current stream."""
    with devices.on_stream_of(x.device):
        return lease.passes.forward(x, parameters)


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
