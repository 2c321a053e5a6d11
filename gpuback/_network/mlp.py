"""The multilayer perceptron: θ, forward pass, loss, gradients; trace and explanation; files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from math import inf
from typing import Any

import numpy as np

from gpuback._backends.protocol import Ops
from gpuback._backends.registry import ops_for, usable_backend
from gpuback._core import persistence
from gpuback._core.architecture import Architecture
from gpuback._core.losses import Loss
from gpuback._core.own_loss import LossFunction
from gpuback._core.parameters import Gradients as Gradients
from gpuback._core.parameters import initial_parameters
from gpuback._core.typing import Array, ArrayLike, PathLike
from gpuback._core.validation import count
from gpuback._network.backprop import Passes, make_passes, passes_key
from gpuback._network.derivatives import Differentiable
from gpuback._network.explain import Explanation, explain
from gpuback._network.inputs import as_batch, as_gradients, as_samples
from gpuback._network.per_sample import PerSample, checked_max_norm, clip_scale
from gpuback._network.pool import Pool
from gpuback._network.reserved import Reserved
from gpuback._network.trace import Trace, trace
from gpuback._network.vjp import Pullback, vjp
from gpuback._text import quoted
from gpuback.errors import FileFormatError, GpubackError, OptionError, ShapeError, UnknownActivationError


class MLP(Differentiable):
    """A feed-forward network: h_k = g_k(W_k h_{k−1} + b_k), ŷ = O(a_L), with a loss averaged over the batch.

    Args:
        sizes: (n_0, …, n_L), the width of the input, of each hidden layer, and of the output.
        activation: g by name, one for all hidden layers or one for each: identity, relu, leaky_relu, elu, sigmoid,
            tanh, softplus, exponential, squareplus, selu, softsign, log_sigmoid, hard_tanh, relu6, hard_sigmoid, gelu
            (the tanh form), silu, gelu_erf (the exact form), sine, mish, hard_swish.
            Some take constants: "leaky_relu(slope=0.2)", "elu(alpha=0.5)", "celu(alpha=2)", "softplus(beta=100)",
            "silu(beta=1.702)", "hard_tanh(low=-2, high=2)", "sine(w0=30)". Or one of your own; see
            `gpuback.register_activation`.
        output: O. The default follows from the loss: "softmax" for cross_entropy, "sigmoid" for binary_cross_entropy,
            "exponential" for poisson, else "identity". squared_error, absolute_error, huber and quantile also go with
            "sigmoid" and "tanh", squared_error with "softmax" too, and a function with softmax and any activation.
        loss: a name, an object of `gpuback.losses`, whose options a name leaves at their defaults, or a function.
            "cross_entropy" (targets: integer labels (B,) or probability rows (B, n_L)), "binary_cross_entropy" ((B,
            n_L) in [0, 1]), "squared_error" ((B, n_L); ½ Σ_j (ŷ_j − y_j)² per sample), "absolute_error", "huber",
            "quantile" (the same targets) or "poisson" ((B, n_L) ≥ 0). A function of (ŷ, y) returns the samples' losses
            (B,) and ∂ℓ/∂ŷ (B, n_L); its targets are B rows of whatever it reads. See docs/own-loss.md.
        dtype: the operands of products are rounded to it: float64, float32, bfloat16 or float16. θ, gradients and sums
            are float64 for float64, else float32.
        allow_tf32: float32 products may round their operands to TF32 (11 significant bits).
        backend: "numpy", "cupy", or "auto" for the fastest that this machine can use.
        reproducible: loss, gradients and every step of training have the same bits on every backend, whatever the BLAS,
            its threads, the GPU and the order of a batch's rows; float32, bfloat16 and float16 only. A product is made
            of exact float64 products of the operands' parts and takes several times as long; see docs/reproducible.md.
        seed: of the initial weights (He uniform for rectifiers, Glorot uniform for the rest, SIREN's for sine(w0=…);
            biases 0), the same on every backend and NumPy version. None takes one from the operating system.

    Raises:
        ShapeError, OptionError, DtypeError: an argument is out of range or unknown.
        BackendError: the backend cannot be used here; the message says why.

    Example:
        >>> net = MLP([2, 3, 2], seed=0)
        >>> net.forward([[1.0, -1.0]]).shape
        (1, 2)
    """

    def __init__(
        self,
        sizes: Iterable[int],
        *,
        activation: str | Sequence[str] = "relu",
        output: str | None = None,
        loss: str | Loss | LossFunction = "cross_entropy",
        dtype: object = "float32",
        allow_tf32: bool = False,
        backend: str = "auto",
        reproducible: bool = False,
        seed: int | None = None,
    ) -> None:
        architecture = Architecture.create(
            sizes,
            activation=activation,
            output=output,
            loss=loss,
            dtype=dtype,
            allow_tf32=allow_tf32,
            reproducible=reproducible,
        )
        architecture.require_learnable()
        names = (*architecture.activations, architecture.output)
        self._assemble(architecture, backend, initial_parameters(architecture.layout, names, seed))

    def _assemble(self, architecture: Architecture, backend: str, theta: ArrayLike) -> None:
        """Set all attributes; `theta` is copied into a fresh buffer."""
        self._architecture = architecture
        self._ops = ops = ops_for(backend, reproducible=architecture.precision.reproducible)
        layout, total = architecture.layout, architecture.precision.accumulator
        self._theta = ops.empty(layout.n_parameters, total)
        self._theta[...] = ops.asarray(theta, total, "theta")
        self._weights, self._biases = layout.split(self._theta)
        self._reserved = Reserved(ops, self._theta)
        self._version = 0  # of θ: one more after each change that is not through a view of θ
        self._pool, self._per_sample_pool, self._held_pool = Pool(), Pool(), Pool()

    @classmethod
    def _of(cls, architecture: Architecture, backend: str, theta: ArrayLike) -> MLP:
        net = cls.__new__(cls)
        net._assemble(architecture, backend, theta)
        return net

    # What it is

    @property
    def sizes(self) -> tuple[int, ...]:
        """(n_0, …, n_L)."""
        return self._architecture.sizes

    @property
    def architecture(self) -> Architecture:
        """The network's structure: sizes, functions, loss and precision."""
        return self._architecture

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of products' operands."""
        return self._architecture.precision.operand

    @property
    def backend(self) -> str:
        """The name of the backend: numpy or cupy."""
        return self._ops.name

    @property
    def reproducible(self) -> bool:
        """Whether results have the same bits on every backend."""
        return self._architecture.precision.reproducible

    @property
    def ops(self) -> Ops:
        """The backend's operations."""
        return self._ops

    @property
    def n_parameters(self) -> int:
        """The length of θ: Σ_k n_k (n_{k−1} + 1)."""
        return self._architecture.layout.n_parameters

    @property
    def theta(self) -> Array:
        """θ = (W_1, b_1, …, W_L, b_L), (n_parameters,). Writing to it changes the network; assigning copies into it."""
        return self._theta

    @theta.setter
    def theta(self, value: ArrayLike) -> None:
        values = self._ops.asarray(value, self._theta.dtype, "theta")
        if values.shape != self._theta.shape:
            raise ShapeError(f"theta: expected shape {self._theta.shape}, got {values.shape}")
        self._version += 1
        self._theta[...] = values

    @property
    def weights(self) -> tuple[Array, ...]:
        """(W_1, …, W_L), each (nO, nI), views into θ: weights[0] is W_1, and `net.weights[0][...] = …` writes it."""
        return self._weights

    @property
    def biases(self) -> tuple[Array, ...]:
        """(b_1, …, b_L), each (nO,), views into θ: biases[0] is b_1."""
        return self._biases

    def __repr__(self) -> str:
        options = self._architecture.as_options()
        sizes = options.pop("sizes")
        if not isinstance(options["loss"], str):
            options["loss"] = self._architecture.loss_row
        arguments = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"MLP({sizes}, {arguments}, backend={self.backend!r})"

    # What it computes

    def forward(self, x: ArrayLike) -> Array:
        """Compute the network's outputs.

        Args:
            x: (B, n_0).

        Returns:
            ŷ (B, n_L), fresh, in θ's dtype (float32 for 16-bit networks).

        Raises:
            ShapeError, DtypeError, DeviceError: x does not fit the network.
        """
        samples = as_samples(x, self._architecture, self._ops)
        outputs = self._ops.empty((len(samples), self.sizes[-1]), self._theta.dtype)
        passes = self._acquire(len(samples), need_gradient=False)
        with self._ops.scope():
            passes.forward(samples, outputs)
        self._release(passes)
        return outputs

    def loss(self, x: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Array:
        """Compute (1/B) Σ_b w_b ℓ(ŷ_b, y_b), a 0-d array; arguments and errors as `value_and_grad`'s."""
        samples, targets, weight = as_batch(x, y, sample_weight, self._architecture, self._ops)
        passes = self._acquire(len(samples), need_gradient=False)
        with self._ops.scope():
            value = passes.loss(samples, targets, weight)
        self._release(passes)
        return self._scalar(value)

    def value_and_grad(
        self,
        x: ArrayLike,
        y: ArrayLike,
        *,
        sample_weight: ArrayLike | None = None,
        need_input_grad: bool = False,
        out: Gradients | None = None,
        accumulate: bool = False,
    ) -> tuple[Array, Gradients]:
        """Compute the loss and its gradients by back-propagation.

        da_L comes from the loss; then, from the last layer down, dW_k = da_kᵀ H_{k−1}, db_k = Σ_b da_k[b] and
        da_{k−1} = (da_k W_k) ⊙ g'(a_{k−1}). NaN and infinity flow through.

        Args:
            x: (B, n_0) real numbers, B ≥ 1: an array, nested sequences, or anything with `__dlpack__`.
            y: targets as the loss wants them (see MLP).
            sample_weight: (B,) w_b, multiplies each sample's loss before the sum. The divisor stays B.
            need_input_grad: also ∂loss/∂x, in `Gradients.inputs`.
            out: gradients to write to, from an earlier call on this network or one of the same sizes; fresh ones by
                default. They may share memory with no other argument, θ or state of an optimizer.
            accumulate: add to out's θ-gradients instead of overwriting them. `inputs` is always overwritten.

        Returns:
            The loss, a 0-d array on the network's backend, and the gradients (`out` if it was given).

        Raises:
            ShapeError, DtypeError, DeviceError: an argument does not fit the network, or what a loss's function
                returned does not fit its ŷ.
            LabelError: a label outside 0 … n_L − 1, a probability outside [0, 1] or a count below 0. Targets on a GPU
                are not checked, which would mean to wait for it: there a label or count outside makes the loss NaN.
            OptionError: accumulate without out; an out that overlaps another array. Or the loss was a function, and the
                network was loaded without it.
        """
        samples, targets, weight = as_batch(x, y, sample_weight, self._architecture, self._ops)
        if accumulate and out is None:
            raise OptionError("accumulate=True adds to out: expected the Gradients of an earlier call, got None")
        inputs = ("x", x, samples), ("y", y, targets), ("sample_weight", sample_weight, weight)
        gradients = as_gradients(out, self._architecture, self._ops, self._reserved, *inputs)
        gradients.inputs = self._ops.empty(samples.shape, self._theta.dtype) if need_input_grad else None
        gradients.outputs = gradients.directions = None
        passes = self._acquire(len(samples), need_input_grad=need_input_grad)
        with self._ops.scope():
            value = passes.value_and_grad(samples, targets, weight, gradients, accumulate=accumulate)
        self._release(passes)
        return self._scalar(value), gradients

    def vjp(self, x: ArrayLike) -> tuple[Array, Pullback]:
        """Compute the outputs, and a function from ∂loss/∂ŷ to the loss's gradients: for a loss of your own.

            y, pullback = net.vjp(x)
            gradients = pullback(dy)  # Σ_b <dy_b, ŷ_b> differentiated by θ

        Nothing is divided by B. The output function belongs to ŷ: behind a softmax, dy is by probabilities. A pullback
        may be called again and again, and any number of them may be alive. Each holds its batch's intermediate arrays
        until it is dropped, and refers to x, which has to stay as it is. So has θ: after `optimizer.step`, a
        `TrainStep` or `net.theta = …` it raises. Writes through views, e.g. `net.weights[0][...] = …`, go unnoticed
        and make gradients wrong.

        Args:
            x: (B, n_0), as for `forward`.

        Returns:
            ŷ (B, n_L), fresh, in θ's dtype, and the pullback, a function (dy, *, need_theta_grad=True,
            need_input_grad=False, out=None, accumulate=False) of dy (B, n_L). It returns `Gradients`. The last three
            are `value_and_grad`'s. Without need_theta_grad there is `Gradients.inputs` alone.

        Raises:
            ShapeError, DtypeError, DeviceError: x, or later dy or out, does not fit the network.
            OptionError: of the pullback: θ has changed; accumulate without out; either without need_theta_grad; nothing
                to compute.

        Example:
            >>> import numpy as np
            >>> net = MLP([2, 3, 1], loss="squared_error", seed=0, backend="numpy")
            >>> x, target = np.ones((4, 2)), np.zeros((4, 1))
            >>> y, pullback = net.vjp(x)
            >>> own = pullback((y - target) / 4)  # of the mean of ½ (y − target)²
            >>> np.allclose(own.theta, net.value_and_grad(x, target)[1].theta)
            True
        """
        return vjp(self, x)

    def gradient_norms(self, x: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Array:
        """Compute per-sample gradient norms, without materialising the gradients.

        ‖∂(w_b ℓ_b)/∂θ‖ = √Σ_k ‖da_k[b]‖² (‖h_{k−1}[b]‖² + 1). The loss is the sample's own, not divided by B. This
        costs the forward pass and the da's, and memory for them. NaN and infinity flow through: where a gradient is not
        finite, nor is its norm. A norm that θ's dtype cannot hold is infinite.

        Arguments and errors as `value_and_grad`'s.

        Returns:
            (B,) on the network's backend, fresh, in θ's dtype.

        Source: Goodfellow, Efficient per-example gradient computations, 2015.
        """
        samples, targets, weight = as_batch(x, y, sample_weight, self._architecture, self._ops)
        norms = self._ops.empty(len(samples), self._theta.dtype)
        with self._per_sample(len(samples)) as passes:
            passes.norms(samples, targets, weight, norms)
        return norms

    def value_and_clipped_grad(
        self,
        x: ArrayLike,
        y: ArrayLike,
        max_norm: float,
        *,
        sample_weight: ArrayLike | None = None,
        out: Gradients | None = None,
    ) -> tuple[Array, Gradients]:
        """Compute the loss, and the mean of the per-sample gradients, each clipped to `max_norm`.

        (1/B) Σ_b min(1, max_norm / ‖g_b‖) g_b with g_b = ∂(w_b ℓ_b)/∂θ, to rounding, in one pass: norms as
        `gradient_norms`'s scale every layer's da before dW and db are summed. A sample whose gradient is 0 keeps it.
        A sample whose norm is not finite makes the whole gradient NaN.

        Args:
            x, y, sample_weight, out: as `value_and_grad`'s.
            max_norm: more than 0; infinite makes this `value_and_grad`.

        Returns:
            The loss as `value_and_grad`'s, which clipping does not change, and the gradients (`out` if it was given).

        Raises:
            OptionError: max_norm is not a number > 0.
            The rest as `value_and_grad`.

        Source: Abadi et al., Deep learning with differential privacy, 2016.
        """
        max_norm = checked_max_norm(max_norm)
        if max_norm == inf:
            return self.value_and_grad(x, y, sample_weight=sample_weight, out=out)
        samples, targets, weight = as_batch(x, y, sample_weight, self._architecture, self._ops)
        inputs = ("x", x, samples), ("y", y, targets), ("sample_weight", sample_weight, weight)
        gradients = as_gradients(out, self._architecture, self._ops, self._reserved, *inputs)
        gradients.inputs = gradients.outputs = gradients.directions = None
        scale = clip_scale(self._architecture.precision, len(samples), max_norm)
        with self._per_sample(len(samples), scale) as passes:
            value = passes.value_and_clipped_grad(samples, targets, weight, max_norm, gradients)
        return self._scalar(value), gradients

    def per_sample_grad(self, x: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Gradients:
        """Compute every sample's own gradient, g_b = ∂(w_b ℓ_b)/∂θ.

        The result is B times as long as θ: for small networks and batches. Arguments and errors as `value_and_grad`'s.

        Returns:
            `theta` (B, n_parameters) in θ's dtype, and as views into it `weights`, each (B, nO, nI), and `biases`, each
            (B, nO). Their mean over the first axis is `value_and_grad`'s gradient, to rounding.
        """
        samples, targets, weight = as_batch(x, y, sample_weight, self._architecture, self._ops)
        theta = self._ops.empty((len(samples), self.n_parameters), self._theta.dtype)
        gradients = Gradients(theta, *self._architecture.layout.split(theta))
        with self._per_sample(len(samples)) as passes:
            passes.gradients(samples, targets, weight, gradients)
        return gradients

    def trace(self, x: ArrayLike, y: ArrayLike, *, sample_weight: ArrayLike | None = None) -> Trace:
        """Run a batch forward and backward and keep every intermediate array: to look inside, to teach, to check.

        Arguments and errors as `value_and_grad`'s.
        """
        samples, targets, weight = as_batch(x, y, sample_weight, self._architecture, self._ops)
        with self._ops.scope():
            return trace(self._architecture, self._theta, self._ops, samples, targets, weight)

    def explain(self, batch_size: int) -> Explanation:
        """Explain a training step on such a batch: its operations, why these, FLOPs and bytes; print the result."""
        return explain(self._architecture, self._ops, count("batch_size", batch_size))

    # Copies and files

    def to(self, backend: str) -> MLP:
        """Copy the network to another backend (or to the same one).

        Raises:
            BackendError: it cannot be used here; the message says why.
        """
        return MLP._of(self._architecture, backend, self._ops.to_numpy(self._theta))

    def save(self, path: PathLike, *, schema: persistence.Storable | None = None) -> None:
        """Write θ and the architecture to a safetensors file, first beside it and then renamed into place.

        Of a loss that is a function, the file holds the name: give `load` the function again.

        Args:
            path: the file.
            schema: how tables become the network's inputs, a `gpuback.datasets.Schema`, to keep in the same file.
        """
        arrays, metadata = {"theta": self._ops.to_numpy(self._theta)}, {"architecture": self._architecture.as_options()}
        if schema is not None:
            more, metadata["schema"] = schema.as_fields()
            arrays |= more
        persistence.write(path, arrays, metadata, kind="model")

    @classmethod
    def load(
        cls,
        path: PathLike,
        backend: str = "auto",
        loss: str | Loss | LossFunction | None = None,
    ) -> MLP:
        """Read the network that `save` wrote, or the one in a checkpoint of `fit`, as it was when that was written.

        Where the file holds a schema (`gpuback.datasets.Schema.load`), the network's inputs are what the schema makes
        of a table.

        Args:
            path: the file.
            backend: as MLP's.
            loss: a loss in place of the file's, as MLP takes it. Where the file's was a function, the network predicts
                without it, and raises when its loss is asked for.

        Raises:
            FileNotFoundError: there is no such file.
            FileFormatError: it is cut short, tampered with, or not a gpuback model; or the network is reproducible, and
                an activation has no reproducible form in this process.
            OptionError: `loss` does not go with the network.
            UnknownActivationError: an activation of a user's own that is not registered in this process.
            BackendError: the backend cannot be used here.
        """
        kind, arrays, metadata = persistence.read_any(path, kinds=("model", "checkpoint"))
        try:
            options = metadata["architecture"] if kind == "model" else metadata["run"]["architecture"]
            architecture = Architecture.from_options(options)
            theta = arrays["theta"]
        except UnknownActivationError as error:
            raise UnknownActivationError(f"{os.fspath(path)}: {error}") from error
        except (KeyError, TypeError, GpubackError) as error:
            raise FileFormatError(
                f"{os.fspath(path)}: expected a gpuback model, got one that makes no network: {error}"
            ) from error
        expected = (architecture.layout.n_parameters,), architecture.precision.accumulator
        if (theta.shape, theta.dtype) != expected:
            raise FileFormatError(
                f"{os.fspath(path)}: expected theta of shape {expected[0]} and dtype {expected[1]} for sizes "
                f"{quoted(architecture.sizes)}, got {theta.shape} and {theta.dtype}"
            )
        if loss is not None:
            architecture = Architecture.create(**architecture.as_options() | {"loss": loss})
        return cls._of(architecture, backend, theta)

    def __getstate__(self) -> dict[str, Any]:
        """Return θ in a host array, for copy and pickle, without buffers, whose views would point into the original θ.

        Whatever a user has added goes along.
        """
        added = {name: value for name, value in self.__dict__.items() if name not in _MADE_ANEW}
        own = {"architecture": self._architecture, "backend": self.backend, "theta": self._ops.to_numpy(self._theta)}
        return {"added": added, **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on with the same backend, or with NumPy and a RuntimeWarning where it cannot be used."""
        self.__dict__.update(state["added"])
        self._assemble(state["architecture"], usable_backend(state["backend"]), state["theta"])

    # For gpuback's own use: here, in `TrainStep` and in `gpuback.sklearn`

    def _acquire(
        self,
        batch_size: int,
        need_gradient: bool = True,
        need_input_grad: bool = False,
        micro_batch_size: int | None = None,
        trainable: tuple[bool, ...] | None = None,
    ) -> Passes:
        """Return the passes for one batch size, from the pool or new; hand them to `_release` unless they raise."""
        key = passes_key(batch_size, need_gradient, need_input_grad, micro_batch_size, trainable)
        return self._pool.acquire(key) or make_passes(self._architecture, self._theta, self._ops, *key)

    def _release(self, passes: Passes) -> None:
        """Keep passes for the next call."""
        self._pool.release(passes)

    @contextmanager
    def _per_sample(self, batch_size: int, clip_scale: float | None = None) -> Iterator[PerSample]:
        """Yield the per-sample passes for one batch size, in the scope that they run in."""
        passes = self._per_sample_pool.acquire((batch_size, clip_scale))
        if passes is None:
            passes = PerSample(self._architecture, self._theta, self._ops, batch_size, clip_scale)
        with self._ops.scope():
            yield passes
        self._per_sample_pool.release(passes)

    def _scalar(self, value: Array | float) -> Array:
        return self._ops.scalar(value, self._theta.dtype)


_MADE_ANEW = {
    *("_architecture", "_ops", "_theta", "_weights", "_biases", "_reserved", "_version"),
    *("_pool", "_per_sample_pool", "_held_pool"),
}
"""The attributes that `_assemble` sets."""
