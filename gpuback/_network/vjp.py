"""The way back from a given gradient of the outputs: `MLP.vjp`'s pullback."""

from __future__ import annotations

import weakref
from typing import NoReturn, Protocol

from gpuback._backends.protocol import Ops
from gpuback._core.architecture import Architecture
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array, ArrayLike
from gpuback._network.held import HeldPasses, Lease
from gpuback._network.inputs import as_gradients, as_samples
from gpuback._network.layers import BoundNetwork
from gpuback._network.pool import Pool
from gpuback._network.reserved import Reserved
from gpuback.errors import CopyError, OptionError, ShapeError


class Versioned(Protocol):
    """A network that counts the changes of its θ."""

    _version: int
    _reserved: Reserved

    @property
    def architecture(self) -> Architecture: ...

    @property
    def ops(self) -> Ops: ...

    @property
    def theta(self) -> Array: ...


def vjp(net: Versioned, pool: Pool, x: ArrayLike) -> tuple[Array, Pullback]:
    """Compute ŷ and the pullback; see `MLP.vjp`. Passes come from `pool` and go back there."""
    architecture, ops, version = net.architecture, net.ops, net._version
    samples = as_samples(x, architecture, ops)
    size = len(samples)
    outputs = ops.empty((size, architecture.sizes[-1]), architecture.precision.accumulator)
    passes = pool.acquire(size)
    if passes is None:
        network = BoundNetwork.of(architecture, net.theta, ops)
        passes = HeldPasses(size, network, size, architecture.output)
    lease = Lease(pool, passes)
    lease.run(passes.in_scope, passes.forward, samples, outputs)
    return outputs, Pullback(net, version, samples, lease)


class Pullback:
    """The derivatives of Σ_b <dy_b, ŷ_b> of one batch, as a function of dy.

    It holds the batch's intermediate arrays and refers to x. It can be called again and again, each time with another
    dy, and any number of pullbacks may be alive, in any order. Dropping it gives the arrays back to the network, which
    uses them for the next batch of that size.
    """

    def __init__(self, net: Versioned, version: int, x: Array, lease: Lease[HeldPasses]) -> None:
        """Args: net: the network; version: of its θ; x: the batch; lease: of the passes that hold it."""
        self._net, self._version, self._lease = net, version, lease
        self._x, self._x_shape = weakref.ref(x), x.shape  # the passes hold x where they need it

    def __call__(
        self,
        dy: ArrayLike,
        *,
        need_theta_grad: bool = True,
        need_input_grad: bool = False,
        out: Gradients | None = None,
        accumulate: bool = False,
    ) -> Gradients:
        """Differentiate Σ_b <dy_b, ŷ_b>, which with dy = ∂loss/∂ŷ gives the loss's gradients, by back-propagation.

        Samples are summed, not averaged: a mean's 1/B belongs into dy.

        Args:
            dy: (B, n_L) real numbers, as `MLP.value_and_grad` takes x.
            need_theta_grad: the derivative by θ.
            need_input_grad: that by x, in `Gradients.inputs`.
            out: gradients to write to, from an earlier call on this network or one of the same sizes; fresh ones by
                default. They may share memory with neither x nor dy nor θ nor the state of an optimizer.
            accumulate: add to out's θ-gradients instead of overwriting them. `inputs` is always overwritten.

        Returns:
            The gradients (`out` if it was given). Without need_theta_grad, `theta` is None, and `weights` and `biases`
            are empty.

        Raises:
            ShapeError, DtypeError, DeviceError: an argument does not fit the network.
            OptionError: θ has changed since; an out that overlaps another array; accumulate without out; either of them
                without need_theta_grad; nothing to compute.
        """
        net = self._net
        architecture, ops = net.architecture, net.ops
        if net._version != self._version:
            raise OptionError("θ has changed since vjp; call vjp again")
        if not (need_theta_grad or need_input_grad):
            raise OptionError("expected need_theta_grad=True or need_input_grad=True: else there is nothing to compute")
        if not need_theta_grad and (out is not None or accumulate):
            raise OptionError("out= and accumulate= are about θ-gradients: expected need_theta_grad=True with them")
        if accumulate and out is None:
            raise OptionError("accumulate=True adds to out: expected the Gradients of an earlier call, got None")
        dtype = architecture.precision.accumulator
        delta = ops.asarray(dy, dtype, "dy")
        expected = self._x_shape[0], architecture.sizes[-1]
        if delta.shape != expected:
            raise ShapeError(f"dy: expected shape {expected}, as y has, got {delta.shape}")
        gradients = Gradients(None, (), ())
        if need_theta_grad:
            gradients = as_gradients(out, architecture, ops, net._reserved, ("x", None, self._x()), ("dy", dy, delta))
        gradients.inputs = ops.empty(self._x_shape, dtype) if need_input_grad else None
        lease = self._lease
        lease.run(lease.passes.in_scope, lease.passes.backward, delta, gradients, accumulate)
        return gradients

    def __copy__(self) -> Pullback:
        """Return the pullback itself: nothing about it changes."""
        return self

    def __reduce__(self) -> NoReturn:
        raise CopyError(
            "a pullback holds its batch in buffers of its network and cannot be copied or pickled; "
            "copy the network, and call its vjp"
        )
