"""The way back from a given gradient of the outputs: `MLP.vjp`'s pullback."""

from __future__ import annotations

from gpuback._core.jets import Jet
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array, ArrayLike
from gpuback._network.held import HeldPasses, HoldsBatch, Lease
from gpuback._network.inputs import as_direction, as_gradients, as_samples, as_theta
from gpuback._network.jet_passes import Jettable, jets_of, refusal
from gpuback._network.layers import BoundNetwork
from gpuback.errors import OptionError, ShapeError


def vjp(net: Jettable, x: ArrayLike) -> tuple[Array, Pullback]:
    """Compute ŷ and the pullback; see `MLP.vjp`."""
    architecture, ops, version, pool = net.architecture, net.ops, net._version, net._held_pool
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


class Pullback(HoldsBatch):
    """The derivatives of Σ_b <dy_b, ŷ_b> of one batch, as a function of dy.

    It holds the batch's intermediate arrays and refers to x. It can be called again and again, each time with another
    dy, and any number of pullbacks may be alive, in any order. Dropping it gives the arrays back to the network, which
    uses them for the next batch of that size.
    """

    def __init__(self, net: Jettable, version: int, samples: Array, lease: Lease[HeldPasses]) -> None:
        """Args: net: the network; version: of its θ; samples: the batch; lease: of the passes that hold it."""
        self._net, self._version, self._samples, self._lease = net, version, samples, lease

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
        delta = self._as_outputs(dy, "dy")
        gradients = Gradients(None, (), ())
        if need_theta_grad:
            inputs = ("x", None, self._samples), ("dy", dy, delta)
            gradients = as_gradients(out, architecture, ops, net._reserved, *inputs)
        gradients.inputs = ops.empty(self._samples.shape, dtype) if need_input_grad else None
        gradients.outputs = gradients.directions = None
        lease = self._lease
        lease.run(lease.passes.in_scope, lease.passes.backward, delta, gradients, accumulate)
        return gradients

    def vjp(
        self,
        dy: ArrayLike,
        *,
        need_theta_grad: bool = False,
        need_input_grad: bool = True,
        out: Gradients | None = None,
        accumulate: bool = False,
    ) -> tuple[Gradients, SecondPullback]:
        """Do what the pullback does, and return a way back through that: for losses with gradients in them.

            y, pullback = net.vjp(x)
            first, second = pullback.vjp(dy)                   # first.inputs is ∂<dy, ŷ>/∂x
            gradients = second(inputs=c)                       # of <c, first.inputs>

        Args:
            dy, need_theta_grad, need_input_grad, out, accumulate: as the pullback's, with other defaults.

        Returns:
            The gradients, and the way back, a `SecondPullback`.

        Raises:
            As the pullback and `MLP.jvp`.

        Source: jax.vjp of a pullback; torch.autograd.grad with create_graph.
        """
        why = refusal(self._net.architecture, self._net.ops, 1, need_backward=True)
        if why is not None:
            raise OptionError(why)
        options = {"need_theta_grad": need_theta_grad, "need_input_grad": need_input_grad}
        gradients = self(dy, out=out, accumulate=accumulate, **options)
        return gradients, SecondPullback(self, self._as_outputs(dy, "dy").copy())

    def _as_outputs(self, value: ArrayLike, name: str) -> Array:
        """Return an array of ŷ's shape in θ's dtype, checked."""
        architecture, ops = self._net.architecture, self._net.ops
        given = ops.asarray(value, architecture.precision.accumulator, name)
        expected = len(self._samples), architecture.sizes[-1]
        if given.shape != expected:
            raise ShapeError(f"{name}: expected shape {expected}, as y has, got {given.shape}")
        return given


class SecondPullback(HoldsBatch):
    """The derivatives of s = Σ <inputs, dx> + <theta, dθ> + <outputs, ŷ>, with dx and dθ from a pullback of dy.

    It may be called again and again. As for `MLP.vjp`, x and θ must stay as they are.
    """

    def __init__(self, pullback: Pullback, dy: Array) -> None:
        """Args: pullback: of the batch; dy: what it was called with."""
        self._pullback, self._dy = pullback, dy

    def __call__(
        self,
        *,
        inputs: ArrayLike | None = None,
        theta: ArrayLike | Gradients | None = None,
        outputs: ArrayLike | None = None,
        need_input_grad: bool = False,
        out: Gradients | None = None,
        accumulate: bool = False,
    ) -> Gradients:
        """Differentiate s: one pass there and back with a direction, as the pullback's result is ŷ's derivative by it.

        Args:
            inputs: (B, n_0), s's derivative by dx; None: 0.
            theta: (n_parameters,), or `Gradients` that hold it, s's derivative by dθ; None: 0.
            outputs: (B, n_L), s's derivative by ŷ; None: 0.
            need_input_grad: also ∂s/∂x, in `.inputs`.
            out, accumulate: as `MLP.value_and_grad`'s.

        Returns:
            .theta is ∂s/∂θ, .outputs is ∂s/∂dy (B, n_L).

        Raises:
            ShapeError, DtypeError, DeviceError: an argument does not fit.
            OptionError: θ has changed; accumulate without out; none of inputs, theta and outputs.
        """
        net, samples = self._pullback._net, self._pullback._samples
        if net._version != self._pullback._version:
            raise OptionError("θ has changed since vjp; call vjp again")
        if inputs is None and theta is None and outputs is None:
            raise OptionError("expected inputs, theta or outputs: else there is nothing to differentiate")
        if accumulate and out is None:
            raise OptionError("accumulate=True adds to out: expected the Gradients of an earlier call, got None")
        ops, dtype = net.ops, net.theta.dtype
        direction = None if inputs is None else as_direction(inputs, samples, ops, "inputs")
        theta_dot = None if theta is None else as_theta(theta, net.theta, ops, "theta")
        adjoint = None if outputs is None else self._pullback._as_outputs(outputs, "outputs")
        read = ("x", None, samples), ("inputs", inputs, direction), ("theta", theta, theta_dot)
        gradients = as_gradients(out, net.architecture, ops, net._reserved, *read, ("outputs", outputs, adjoint))
        jet, size = Jet(1, moving=theta is not None), len(samples)
        by_inputs = ops.empty((2, *samples.shape), dtype) if need_input_grad else None
        by_dy = ops.empty(self._dy.shape, dtype)
        dy = self._dy

        def top(jets: Array, seeds: Array, rows: slice) -> None:
            by_dy[rows] = jets[1]
            seeds[0] = 0 if adjoint is None else adjoint[rows]
            seeds[1] = dy[rows]

        passes = jets_of(net, size, jet)
        if theta_dot is not None:
            passes.theta_dot[...] = theta_dot
        passes.in_scope(passes.differentiate, samples, direction, top, gradients, by_inputs, accumulate)
        net._held_pool.release(passes)
        gradients.inputs, gradients.outputs = None if by_inputs is None else by_inputs[0], by_dy
        gradients.directions = None
        return gradients
