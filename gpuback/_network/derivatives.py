"""Derivatives of a network's outputs and of its loss, beyond the gradient: methods of `MLP`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from gpuback._backends.inputs import as_host_array
from gpuback._core.jets import Jet
from gpuback._core.loss_curvatures import curvature, is_canonical
from gpuback._core.parameters import Gradients
from gpuback._core.typing import Array, ArrayLike
from gpuback._network.backprop import empty_gradients
from gpuback._network.held import HoldsBatch, Lease
from gpuback._network.inputs import as_batch, as_direction, as_gradients, as_samples, as_theta
from gpuback._network.jet_passes import JetPasses, Jettable, jets_of, refusal
from gpuback._network.vjp import vjp
from gpuback.errors import OptionError, ShapeError

MOST_DIRECTIONS = 16
"""Directions that a Jacobian takes through the network at a time."""


class Differentiable(Jettable):
    """The derivatives of a network; the base of `MLP`."""

    def jvp(
        self, x: ArrayLike, dx: ArrayLike | None = None, dtheta: ArrayLike | Gradients | None = None
    ) -> tuple[Array, Array]:
        """Compute the outputs and how they move when x and θ do: ẏ = ∂ŷ/∂x ẋ + ∂ŷ/∂θ θ̇, by forward differentiation.

        Args:
            x: (B, n_0), as for `forward`.
            dx: ẋ, of x's shape; None: x does not move.
            dtheta: θ̇, (n_parameters,), or `Gradients` that hold it; None: θ does not move.

        Returns:
            ŷ and ẏ, both (B, n_L), fresh, in θ's dtype.

        Raises:
            ShapeError, DtypeError, DeviceError: an argument does not fit the network.
            OptionError: neither dx nor dtheta; the network cannot (see docs/derivatives.md).

        Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994; jax.jvp.

        Example:
            >>> from gpuback import MLP
            >>> net = MLP([2, 3, 1], activation="tanh", loss="squared_error", seed=0)
            >>> y, dy = net.jvp([[0.0, 1.0]], dx=[[1.0, 0.0]])
            >>> y.shape, dy.shape
            ((1, 1), (1, 1))
        """
        samples, directions, theta_dot = self._moves(x, dx, dtheta)
        out = self._jets_forward(samples, directions, Jet(1, moving=theta_dot is not None), theta_dot)
        return out[0], out[1]

    def jacobian(self, x: ArrayLike) -> Array:
        """Compute ∂ŷ_bi/∂x_bj of each sample: by as many directions as inputs, or from the outputs, if those are fewer.

        Args:
            x: (B, n_0), as for `forward`.

        Returns:
            (B, n_L, n_0), fresh, in θ's dtype.

        Raises:
            ShapeError, DtypeError, DeviceError: x does not fit the network.

        Source: jax.jacfwd, jax.jacrev.
        """
        samples = as_samples(x, self.architecture, self.ops)
        n_in, n_out = self.architecture.sizes[0], self.architecture.sizes[-1]
        jacobian = self.ops.empty((len(samples), n_out, n_in), self.theta.dtype)
        if n_out < n_in or refusal(self.architecture, self.ops, 1, need_backward=False):
            y, pullback = vjp(self, samples)
            dy = self.ops.empty(y.shape, y.dtype)
            for i in range(n_out):
                dy[...] = 0
                dy[:, i] = 1
                jacobian[:, i] = pullback(dy, need_theta_grad=False, need_input_grad=True).inputs
            return jacobian
        units = _units(n_in, self.theta.dtype)
        for start in range(0, n_in, MOST_DIRECTIONS):
            some = units[start : start + MOST_DIRECTIONS]
            out = self._jets_forward(samples, some, Jet(len(some)), None)
            jacobian[:, :, start : start + len(some)] = np.moveaxis(out[1:], 0, 2)
        return jacobian

    def taylor(
        self,
        x: ArrayLike,
        v: ArrayLike | None = None,
        *,
        order: Literal[1, 2] = 2,
        second: ArrayLike | None = None,
    ) -> Taylor:
        """Compute the outputs with their first and second derivatives along directions, and a way back through them.

            t = net.taylor(x, v)             # t.first[d] = ∂ŷ/∂v_d, t.second[s] = Σ_d C_sd ∂²ŷ/∂v_d²
            gradients = t.pullback(y=c_0, first=c_1, second=c_2)   # of Σ <c_0, y> + <c_1, first> + <c_2, second>

        A loss with derivatives in it (a differential equation's residual) needs no more: its derivatives by `t.y`,
        `t.first` and `t.second` go into `pullback`. Mixed derivatives come by polarisation: ∂²/∂v∂w =
        ¼ (∂²/∂(v + w)² − ∂²/∂(v − w)²), two directions with the row (¼, −¼) of `second`.

        Args:
            x: (B, n_0), as for `forward`.
            v: the directions: (D, n_0), or (D, B, n_0) with one for each sample. None: the unit vectors, D = n_0.
            order: 1: no second derivatives.
            second: C, (S, D), the weights of second derivatives in each of S sums. None: each direction's own, S = D.

        Returns:
            A `Taylor`. It holds the planes of all layers until it is dropped: two to three times (1 + D + S) arrays of
            each layer's outputs.

        Raises:
            As `jvp`.

        Source: Griewank and Walther, Evaluating Derivatives, 2008, chapter 13; Dangel et al., "Collapsing Taylor mode
            automatic differentiation", 2025.
        """
        architecture, ops, version = self.architecture, self.ops, self._version
        dtype, n_in = architecture.precision.accumulator, architecture.sizes[0]
        samples = as_samples(x, architecture, ops)
        size = len(samples)
        directions = _units(n_in, dtype) if v is None else ops.asarray(v, dtype, "v")
        if directions.ndim == 2:
            directions = directions[:, None]
        if directions.ndim != 3 or len(directions) == 0 or directions.shape[1:] not in {(1, n_in), (size, n_in)}:
            raise ShapeError(f"v: expected shape (D, {n_in}) or (D, {size}, {n_in}), got {directions.shape}")
        if not isinstance(order, (int, np.integer)) or order not in (1, 2):
            raise OptionError(f"order: expected 1 or 2, got {order!r}")
        if order == 1 and second is not None:
            raise OptionError("second= weighs second derivatives: expected order=2 with it")
        jet = Jet(len(directions), _weights(second, len(directions)) if order == 2 else ())
        outputs = ops.empty((jet.planes, size, architecture.sizes[-1]), dtype)
        passes = jets_of(self, size, jet, held=True)
        lease = Lease(self._held_pool, passes)
        lease.run(passes.in_scope, passes.forward, samples, directions, outputs)
        first, after = outputs[1 : 1 + jet.directions], outputs[1 + jet.directions :]
        return Taylor(outputs[0], first, after if jet.seconds else None, self, version, lease)

    def laplacian(self, x: ArrayLike) -> Taylor:
        """Compute the outputs, their gradients by x, and the sum of their second derivatives, Δŷ = Σ_j ∂²ŷ/∂x_j².

        It is `taylor(x, second=[[1, …, 1]])`: n_0 + 2 planes go through the network.

        Args:
            x: (B, n_0), as for `forward`.

        Returns:
            A `Taylor`, whose `second[0]` is Δŷ (B, n_L).

        Raises:
            As `jvp`.

        Source: Li et al., "Forward Laplacian: a new computational framework for neural network-based variational Monte
            Carlo", 2023.
        """
        return self.taylor(x, second=np.ones((1, self.architecture.sizes[0])))

    def hvp(
        self,
        x: ArrayLike,
        y: ArrayLike,
        dtheta: ArrayLike | Gradients | None = None,
        dx: ArrayLike | None = None,
        *,
        sample_weight: ArrayLike | None = None,
    ) -> Gradients:
        """Multiply the loss's Hessian by a vector: how `value_and_grad`'s gradients move when θ and x do.

        Args:
            x, y, sample_weight: a batch, as for `value_and_grad`; the loss is its mean.
            dtheta: θ̇, (n_parameters,), or `Gradients` that hold it; None: θ does not move.
            dx: ẋ, of x's shape; None: x does not move.

        Returns:
            `Gradients`, fresh: .theta is ∂²loss/∂θ² θ̇ + ∂²loss/∂θ∂x ẋ. With dx, .inputs is ∂²loss/∂x² ẋ +
            ∂²loss/∂x∂θ θ̇.

        Raises:
            As `jvp` and `value_and_grad`. OptionError: the loss is a function without `hessian_vector`.

        Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
        """
        return self._second_order(x, y, dtheta, dx, sample_weight, of_outputs=True)

    def gnvp(
        self,
        x: ArrayLike,
        y: ArrayLike,
        dtheta: ArrayLike | Gradients,
        *,
        sample_weight: ArrayLike | None = None,
    ) -> Gradients:
        """Multiply the loss's Gauss-Newton matrix by a vector: Jᵀ ∇²ℓ J θ̇, the Hessian if ŷ were linear in θ.

        It is positive semidefinite for a convex loss. J ends at the output layer's pre-activations for cross-entropy,
        binary cross-entropy, Poisson, and squared error without an output function, whose ∇²ℓ is then by those; else at
        ŷ.

        Args:
            x, y, sample_weight: a batch, as for `value_and_grad`.
            dtheta: θ̇, (n_parameters,), or `Gradients` that hold it.

        Returns:
            `Gradients`, fresh.

        Raises:
            As `hvp`.

        Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.
        """
        if dtheta is None:
            raise OptionError("dtheta: expected how θ moves, got None")
        return self._second_order(x, y, dtheta, None, sample_weight, of_outputs=False)

    def _second_order(
        self,
        x: ArrayLike,
        y: ArrayLike,
        dtheta: ArrayLike | Gradients | None,
        dx: ArrayLike | None,
        sample_weight: ArrayLike | None,
        *,
        of_outputs: bool,
    ) -> Gradients:
        """Compute `hvp`, or `gnvp` without the outputs' own second derivatives."""
        architecture, ops = self.architecture, self.ops
        samples, targets, weight = as_batch(x, y, sample_weight, architecture, ops)
        _, directions, theta_dot = self._moves(samples, dx, dtheta)
        row, size, dtype = architecture.loss_row, len(samples), architecture.precision.accumulator
        curved = curvature(row)
        jet = Jet(1, moving=theta_dot is not None)
        passes = jets_of(self, size, jet, to_a=is_canonical(row, architecture.output))
        if theta_dot is not None:
            passes.theta_dot[...] = theta_dot
        gradients = empty_gradients(architecture, ops)
        inputs = None if dx is None else ops.empty((2, *samples.shape), dtype)

        def top(outputs: Array, seeds: Array, rows: slice) -> None:
            slope, bend = curved(outputs[0], outputs[1], targets[rows])
            factor = 1 / size if weight is None else weight[rows, None] / size
            seeds[0] = bend * factor
            seeds[1] = slope * factor if of_outputs else 0

        passes.in_scope(passes.differentiate, samples, directions, top, gradients, inputs, False)
        self._held_pool.release(passes)
        gradients.inputs = None if inputs is None else inputs[0]
        return gradients

    def _moves(
        self, x: ArrayLike, dx: ArrayLike | None, dtheta: ArrayLike | Gradients | None
    ) -> tuple[Array, Array | None, Array | None]:
        """Return x, ẋ (1, B, n_0) and θ̇ (n_parameters,), checked."""
        if dx is None and dtheta is None:
            raise OptionError("expected dx or dtheta: else nothing moves")
        samples = as_samples(x, self.architecture, self.ops)
        direction = None if dx is None else as_direction(dx, samples, self.ops, "dx")
        return samples, direction, None if dtheta is None else as_theta(dtheta, self.theta, self.ops, "dtheta")

    def _jets_forward(self, samples: Array, directions: Array | None, jet: Jet, theta_dot: Array | None) -> Array:
        """Return ŷ's jet (P, B, n_L)."""
        architecture = self.architecture
        shape = jet.planes, len(samples), architecture.sizes[-1]
        out = self.ops.empty(shape, architecture.precision.accumulator)
        passes = jets_of(self, len(samples), jet, need_backward=False)
        if theta_dot is not None:
            passes.theta_dot[...] = theta_dot
        passes.in_scope(passes.forward, samples, directions, out)
        self._held_pool.release(passes)
        return out


@dataclass(eq=False)
class Taylor(HoldsBatch):
    """A batch's outputs with their derivatives along directions, and the way back: what `MLP.taylor` returns.

    Attributes:
        y: ŷ (B, n_L).
        first: (D, B, n_L), ∂ŷ/∂v_d.
        second: (S, B, n_L), Σ_d C_sd ∂²ŷ/∂v_d²; None with order=1.
    """

    y: Array
    first: Array
    second: Array | None
    _net: Differentiable = field(repr=False)
    _version: int = field(repr=False)
    _lease: Lease[JetPasses] = field(repr=False)

    def pullback(
        self,
        y: ArrayLike | None = None,
        first: ArrayLike | None = None,
        second: ArrayLike | None = None,
        *,
        need_input_grad: bool = False,
        out: Gradients | None = None,
        accumulate: bool = False,
    ) -> Gradients:
        """Differentiate Σ <y, ŷ> + <first, ∂ŷ/∂v> + <second, Σ C ∂²ŷ/∂v²>, by back-propagation.

        It may be called again and again. As for `MLP.vjp`, x and θ must stay as they are.

        Args:
            y, first, second: of the shapes of the attributes with these names: a loss's derivatives by them. None: 0.
            need_input_grad: also by x, in `.inputs` (B, n_0), and by the directions, in `.directions` (D, B, n_0).
            out, accumulate: as `MLP.value_and_grad`'s.

        Returns:
            The gradients (`out` if it was given).

        Raises:
            ShapeError, DtypeError, DeviceError: an argument does not fit.
            OptionError: θ has changed; accumulate without out; nothing given.
        """
        net = self._net
        architecture, ops = net.architecture, net.ops
        if net._version != self._version:
            raise OptionError("θ has changed since taylor; call taylor again")
        if accumulate and out is None:
            raise OptionError("accumulate=True adds to out: expected the Gradients of an earlier call, got None")
        dtype = architecture.precision.accumulator
        seeds: list[Array | None] = []
        for name, value, like in (
            ("y", y, self.y[None]),
            ("first", first, self.first),
            ("second", second, self.second),
        ):
            if like is None:
                if value is not None:
                    raise OptionError("second: expected None, as taylor was asked for order=1")
                continue
            given = None if value is None else ops.asarray(value, dtype, name)
            if given is not None and given.shape != (like.shape if name != "y" else like.shape[1:]):
                raise ShapeError(
                    f"{name}: expected shape {like.shape if name != 'y' else like.shape[1:]}, got {given.shape}"
                )
            planes: Sequence[Array | None] = [None] * len(like)
            if given is not None:
                planes = [given] if name == "y" else list(given)
            seeds += planes
        if all(seed is None for seed in seeds):
            raise OptionError("expected y, first or second: else there is nothing to differentiate")
        read = ("y", y, None), ("first", first, None), ("second", second, None), ("t.y", None, self.y)
        gradients = as_gradients(out, architecture, ops, net._reserved, *read)
        lease = self._lease
        inputs = None
        if need_input_grad:
            jet = lease.passes.jet
            inputs = ops.empty((jet.straight_planes, len(self.y), architecture.sizes[0]), dtype)
        lease.run(lease.passes.in_scope, lease.passes.backward, seeds, gradients, inputs, accumulate)
        gradients.inputs, gradients.outputs = None if inputs is None else inputs[0], None
        gradients.directions = None if inputs is None else inputs[1:]
        return gradients


def _units(n: int, dtype: np.dtype) -> Array:
    """Return the n unit vectors as directions (n, 1, n)."""
    return np.eye(n, dtype=dtype)[:, None]


def _weights(second: ArrayLike | None, directions: int) -> tuple[tuple[float, ...], ...]:
    """Return C (S, D), checked."""
    float64 = np.dtype(np.float64)
    weights = np.eye(directions) if second is None else as_host_array(second, float64, "second")
    if weights.ndim != 2 or len(weights) == 0 or weights.shape[1] != directions:
        raise ShapeError(f"second: expected shape (S, {directions}), a column for each direction, got {weights.shape}")
    if not np.isfinite(weights).all():
        raise OptionError("second: expected finite numbers, got NaN or infinity among them")
    return tuple(map(tuple, weights.tolist()))
