"""The layers of a network as one operation of PyTorch's automatic differentiation.

Tensors are not copied: NumPy or CuPy arrays over their memory go to gpuback's operations, and results are written into
tensors that PyTorch allocated, on PyTorch's current stream. What the forward pass leaves for the backward pass stays in
buffers that belong to that one call until its graph is freed, so calls may be nested in any order.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.precision import DTYPES, Precision
from gpuback._core.threads import ThreadPool, blas_threads
from gpuback._core.typing import Array
from gpuback._network.backprop import Layers, in_shares
from gpuback._torch import devices
from gpuback.errors import DtypeError

KEPT_PASSES = 4
"""How many calls' buffers a module keeps for the next ones."""


class Passes:
    """A module's layers for one batch size: bound to its parameters' own memory, or to rounded copies of them.

    As in `_network/backprop.py`, a batch goes through the network in blocks of rows, which the backend's team shares;
    but here every block has buffers of its own, in which it waits for its backward pass.
    """

    def __init__(
        self,
        architecture: Architecture,
        parameters: Sequence[torch.Tensor],
        ops: Ops,
        batch_size: int,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> None:
        """Args: parameters: W_1, b_1, …, W_L, b_L; the other arguments as those of `Backprop`."""
        precision, layout = architecture.precision, architecture.layout
        self._ops, self._architecture = ops, architecture
        self._float16 = precision.operand == np.float16
        self._need_gradient, self._need_input_grad = need_gradient, need_input_grad
        weights, biases = self._operands(parameters)

        def block(rows: int) -> _Block:
            return _Block(architecture, weights, biases, ops, rows, need_gradient, need_input_grad)

        rows, self._threads = ops.plan_blocks(architecture.sizes, batch_size, precision, need_gradient=need_gradient)
        if torch.get_num_threads() == 1:
            self._threads = ThreadPool(1, blas_alone=blas_threads() > 1)
        sums_bytes = layout.n_parameters * precision.accumulator.itemsize if need_gradient else 0
        self._shares = in_shares(batch_size, rows, self._threads.size, sums_bytes)
        ends = list(itertools.chain.from_iterable(self._shares))
        if need_gradient:
            self._blocks: dict[object, _Block] = {start: block(end - start) for start, end in ends}
            self._partials = [ops.empty(layout.n_parameters, precision.accumulator) for _ in self._shares[1:]]
        else:
            workers, heights = range(min(self._threads.size, len(self._shares))), {end - start for start, end in ends}
            self._blocks = {(height, worker): block(height) for height in heights for worker in workers}

    def _operands(self, parameters: Sequence[torch.Tensor]) -> tuple[Sequence[Array], Sequence[Array]]:
        """Weights and biases as products read them."""
        ops, precision, layout = self._ops, self._architecture.precision, self._architecture.layout
        self._copies: list[torch.Tensor] = []
        self._round_weights: Callable[[], object] = _nothing
        if reads_in_place(precision, parameters):
            arrays = [devices.array_over(parameter, ops) for parameter in parameters]
            return arrays[::2], arrays[1::2]
        with torch.inference_mode(False):  # or no later call outside of that mode could write to it
            theta = torch.empty(layout.n_parameters, dtype=dtype_of_sums(precision), device=parameters[0].device)
        self._copies = [part for pair in zip(*layout.split(theta), strict=True) for part in pair]
        flat = devices.array_over(theta, ops)
        weights, self._round_weights = ops.bind_weights(flat, layout, precision)
        return weights, layout.split(flat)[1]

    def forward(self, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
        """a_L (B, n_L), fresh."""
        for copy, parameter in zip(self._copies, parameters if self._copies else (), strict=True):
            copy.copy_(parameter)
        self._round_weights()
        out = x.new_empty(len(x), self._architecture.sizes[-1])
        samples, a = devices.array_over(x, self._ops), devices.array_over(out, self._ops)

        def work(share: int, worker: int) -> None:
            for start, end in self._shares[share]:
                block = self._blocks[start if self._need_gradient else (end - start, worker)]
                block.run_forward(samples[start:end], a[start:end])

        self._threads.run(work, len(self._shares))
        return out

    def backward(self, da: torch.Tensor) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """∂loss/∂x, if it was bound, and ∂loss/∂W_1, ∂loss/∂b_1, …, from ∂loss/∂a_L; all of them fresh."""
        layout, ops = self._architecture.layout, self._ops
        if self._float16:
            da, unscale = _scaled(da)
        flat = da.new_empty(layout.n_parameters)
        dx = da.new_empty(len(da), self._architecture.sizes[0]) if self._need_input_grad else None
        delta, whole = devices.array_over(da.contiguous(), ops), devices.array_over(flat, ops)
        inputs = None if dx is None else devices.array_over(dx, ops)
        sums = [layout.split(part) for part in (whole, *self._partials)]

        def work(share: int, worker: int) -> None:
            for start, end in self._shares[share]:
                block = self._blocks[start]
                block.run_backward(delta[start:end], *sums[share], start > self._shares[share][0][0])
                if inputs is not None:
                    inputs[start:end] = block.input_gradient

        self._threads.run(work, len(self._shares))
        for partial in self._partials:
            whole += partial
        if self._float16:
            flat *= unscale
            dx = None if dx is None else dx.mul_(unscale)
        return dx, [part for pair in zip(*layout.split(flat), strict=True) for part in pair]

    def forget(self) -> None:
        """Lets go of the batch."""
        for block in self._blocks.values():
            block.h_0 = None


class _Block(Layers):
    """A number of rows, on their way out and back in."""

    def __init__(
        self,
        architecture: Architecture,
        weights: Sequence[Array],
        biases: Sequence[Array],
        ops: Ops,
        rows: int,
        need_gradient: bool,
        need_input_grad: bool,
    ) -> None:
        super().__init__(architecture, weights, biases, ops, rows, 1.0, need_gradient, need_input_grad)
        self.h_0: Array = None
        self._write_output = ops.bind_output("identity", self.output, self.workspace)
        self._load_delta = ops.bind_load(architecture.sizes[-1], architecture.precision, self.workspace)

    def run_forward(self, x: Array, out: Array) -> None:
        """out = a_L; h_0, which may be x itself, is kept for the way back."""
        self.h_0 = self.forward(x)
        self._write_output(out)

    def run_backward(self, da: Array, dW: Sequence[Array], db: Sequence[Array], accumulate: bool) -> None:
        """From da, ∂loss/∂a_L."""
        _bits(self.output_delta)[...] = _bits(self._load_delta(da))
        self.backward(self.h_0, dW, db, accumulate)


def _bits(array: Array) -> Array:
    """An array's numbers as integers, for a copy of them as they are, whatever a backend's own arithmetic does."""
    return array.view(np.dtype(f"u{array.itemsize}"))


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
        key = (rows, precision, need_gradient, need_input_grad, device, devices.stream_of(device), *own)
        for _ in range(len(self._free)):
            try:
                found, passes = self._free.popleft()
            except IndexError:
                break
            if found == key:
                return Lease(self, key, passes)
            self._free.append((found, passes))
        ops, architecture = devices.ops_on(device.type, device.index), replace(architecture, precision=precision)
        with devices.on_stream_of(device):  # which buffers are zeroed on, and freed on
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
    """Passes that belong to one call as long as this object lives: PyTorch drops it with the call's graph.

    Attributes:
        lock: held on the way back, which threads may go through one graph at once.
    """

    def __init__(self, pool: Pool, key: tuple[Any, ...], passes: Passes) -> None:
        self._pool, self._key, self.passes, self.lock = pool, key, passes, threading.Lock()

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
    """Gradients as they are, and an error on the way back through them. PyTorch's `once_differentiable` takes them for
    constants where ∂loss/∂a_L is one.
    """

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The first of the tensors; the others are what they depend on."""
        return tensors[:count]

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> None:
        raise RuntimeError(
            "FusedMLP has no gradients of gradients; gpuback.torch.to_torch(module) is an nn.Sequential, which has them"
        )


def run_forward(lease: Lease, x: torch.Tensor, parameters: Sequence[torch.Tensor]) -> torch.Tensor:
    """a_L (B, n_L), fresh."""
    with devices.on_stream_of(x.device):
        return lease.passes.forward(x, parameters)


def name_of(dtype: torch.dtype) -> str:
    """A dtype that gpuback computes in, by its name."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise DtypeError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    return name


def dtype_of_sums(precision: Precision) -> torch.dtype:
    """That of x, a_L and the gradients."""
    return torch.float64 if precision.accumulator.itemsize == 8 else torch.float32


def reads_in_place(precision: Precision, parameters: Sequence[torch.Tensor]) -> bool:
    """Whether products can read the parameters where they are."""
    rounded = precision.sixteen_bit or precision.tf32
    return not rounded and all(parameter.is_contiguous() for parameter in parameters)


def _nothing() -> None:
    """What there is to do where nothing is rounded."""
